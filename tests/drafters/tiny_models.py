"""Tiny random models on real ranks, in fp64, and what the target would say."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tiny import VOCAB as TINY_VOCAB
from tiny import save_tiny_llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cluster.core.accept import decide
from cluster.core.types import SamplingParams
from cluster.core.warp import History
from cluster.engine.decoder import Decoder
from cluster.engine.kernels_torch import TorchKernels
from cluster.engine.kv_cache import KVCache, SlotRows
from cluster.engine.model_config import DecoderConfig
from cluster.engine.rank import Rank

VOCAB = 83
GREEDY = SamplingParams(temperature=0.0, seed=3)
SAMPLED = SamplingParams(temperature=1.0, seed=3)


class CountingRank(Rank):
    """Counts forward passes and notes the rows and skips of each."""

    def __init__(self, decoder: Decoder, kv: KVCache) -> None:
        super().__init__(decoder, kv)
        self.passes: list[tuple[int, frozenset[int]]] = []

    def forward(self, batch: Sequence[SlotRows], skip: frozenset[int] = frozenset()) -> torch.Tensor:
        self.passes.append((sum(len(rows.tokens) for rows in batch), skip))
        return super().forward(batch, skip)


def tiny_config(vocab_size: int = VOCAB, num_layers: int = 4) -> DecoderConfig:
    return DecoderConfig(
        architecture="llama",
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=num_layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        norm_eps=1e-5,
        inv_freq=(1.0, 0.3, 0.1, 0.03),
        rope_scaling=1.0,
        max_positions=512,
        tie_word_embeddings=False,
    )


def tiny_weights(config: DecoderConfig, seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=rng, dtype=torch.float64)

    hidden, inner = config.hidden_size, config.intermediate_size
    head = config.head_dim
    weights = {
        "model.embed_tokens.weight": normal(config.vocab_size, hidden, scale=1.0),
        "model.norm.weight": torch.ones(hidden, dtype=torch.float64),
        "lm_head.weight": normal(config.vocab_size, hidden, scale=0.6),
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": torch.ones(hidden, dtype=torch.float64),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.float64),
            f"{prefix}.self_attn.q_proj.weight": normal(config.num_heads * head, hidden),
            f"{prefix}.self_attn.k_proj.weight": normal(config.num_kv_heads * head, hidden),
            f"{prefix}.self_attn.v_proj.weight": normal(config.num_kv_heads * head, hidden),
            f"{prefix}.self_attn.o_proj.weight": normal(hidden, config.num_heads * head),
            f"{prefix}.mlp.gate_proj.weight": normal(inner, hidden),
            f"{prefix}.mlp.up_proj.weight": normal(inner, hidden),
            f"{prefix}.mlp.down_proj.weight": normal(hidden, inner),
        }
    return weights


def tiny_rank(
    seed: int = 0,
    *,
    vocab_size: int = VOCAB,
    num_layers: int = 4,
    num_slots: int = 4,
    capacity: int = 160,
    scratch: int = 96,
) -> CountingRank:
    """Equal seeds and shapes give equal weights."""
    config = tiny_config(vocab_size, num_layers)
    kernels = TorchKernels(torch.float64)
    decoder = Decoder(config, tiny_weights(config, seed), kernels, capacity + scratch)
    return CountingRank(decoder, KVCache(config, num_slots, capacity, scratch, torch.float64))


def chain(slot: int, tokens: Sequence[int], logits: bool = True) -> SlotRows:
    return SlotRows(slot, np.asarray(tokens, np.int32), np.arange(-1, len(tokens) - 1, dtype=np.int32), logits=logits)


def continuation(rank: Rank, tokens: Sequence[int], params: SamplingParams, count: int) -> list[int]:
    """What the model says after ``tokens`` (its prompt), decided as the verifier decides, without any cache reuse."""
    text = list(tokens)
    history = History(tokens, (), params)
    for _ in range(count):
        slot = rank.kv.allocate()
        row = rank.forward([chain(slot, text)])[-1].numpy()
        rank.kv.free(slot)
        text.append(decide(row, params, history, len(text), frozenset()).token)
        history.push(text[-1])
    return text[len(tokens) :]


def random_tokens(seed: int, count: int, vocab_size: int = VOCAB) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, count)]


def save_target(folder: Path, words: str = "w") -> Path:
    """A tiny Llama as transformers stores it, with a tokenizer of one word a token."""
    save_tiny_llama(folder)
    tokenizer = Tokenizer(
        models.WordLevel({f"{words}{index}": index for index in range(TINY_VOCAB)}, unk_token=f"{words}0")
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=f"{words}0").save_pretrained(folder)
    return folder


def training_arguments(target: Path, chats: Path, out: Path, **own: object) -> argparse.Namespace:
    """What ``drafters.training.trainer`` wants, for a run of a second; ``own``: the trainer's own arguments."""
    settings = {
        "model": str(target),
        "chats": [chats],
        "out": out,
        "work": out.with_name("work"),
        "head_tokens": 96,
        "batch_tokens": 128,
        "max_tokens": None,
        "longest": 64,
        "lr": 5e-3,
        "seed": 0,
        "threads": 1,
        "save_every_s": 1e9,
    }
    return argparse.Namespace(**{**settings, **own})

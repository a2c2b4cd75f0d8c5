"""Tiny random models on disk, for tests that need a real engine but no real weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 256


def save_tiny_llama(folder: Path, *, layers: int = 4, seed: int = 0, vocab_size: int = VOCAB, **changes: int) -> Path:
    """A random Llama whose logits are spread enough that sampling has something to choose from."""
    config = LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.12,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **changes,
        }
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder

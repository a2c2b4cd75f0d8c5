"""The decoder of the Llama family, written once over ``Kernels``: Llama, Mistral, Qwen2, Qwen3, SmolLM.

It keeps no state between steps: rows (with their tree), the KV cache and the sub-layers to skip are arguments.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cluster.engine.collectives import RankGroup
from cluster.engine.kernels import Kernels
from cluster.engine.kv_store import KVStore
from cluster.engine.model_config import DecoderConfig
from cluster.engine.packed import Heads, PackedLayer, PackedModel
from cluster.engine.rows import StepRows
from cluster.engine.sharded import ShardedForward

ROPE_CHUNK = 1024


class Decoder:
    """Packed weights and the forward pass.

    weights: named as in the stock model (``model.layers.0.self_attn.q_proj.weight``), in the kernels' dtype.
    num_positions: position ids that can occur, that is, the KV cache's capacity plus scratch.
    group: given where this is one rank of several; ``config`` and ``weights`` are its shard's then.
    head_tokens: (n,) ids, of a head that knows a part of the vocabulary only: its rows, in order. The others never get
    a chance. Not with ``group``.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, torch.Tensor],
        kernels: Kernels,
        num_positions: int,
        group: RankGroup | None = None,
        head_tokens: torch.Tensor | None = None,
    ) -> None:
        self.config = config
        self._head_tokens = head_tokens
        self.head_size = config.vocab_size if head_tokens is None else len(head_tokens)
        self.kernels = kernels
        embedding = kernels.place(weights["model.embed_tokens.weight"])
        head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        cos, sin = _rope_tables(config, num_positions, kernels.dtype)
        self.num_positions = num_positions
        shared = group is not None
        packed = PackedModel(
            embedding,
            tuple(_pack_layer(config, weights, kernels, index, shared) for index in range(config.num_layers)),
            kernels.place(weights["model.norm.weight"]),
            kernels.pack(head, wide=True),
            Heads(
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                config.norm_eps,
                kernels.place(cos),
                kernels.place(sin),
            ),
        )
        self.model = packed if group is None else None
        """What a drafter's view shares; None of one rank among several."""
        self._forward = (
            kernels.forward_of(packed)
            if group is None
            else ShardedForward(kernels.shard_of(packed), packed, config.vocab_size, group)
        )

    def forward(
        self,
        step: StepRows,
        kv: KVStore,
        skip: frozenset[int] = frozenset(),
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of the wanted rows: (wanted, vocab) fp32. Writes the rows' keys and values into the cache.

        Sub-layers are numbered 2 * layer (attention) and 2 * layer + 1 (MLP). A skipped one is the identity: only the
        residual passes, and a skipped attention writes no keys. Of several ranks, all call it alike, and only rank 0
        gets logits. ``features``: see ``Forward``; not of one rank among several.
        """
        logits = self._forward(step, kv, skip, features)
        if self._head_tokens is None:
            return logits
        whole = logits.new_full((len(logits), self.config.vocab_size), -torch.inf)
        whole[:, self._head_tokens] = logits
        return whole


def _pack_layer(
    config: DecoderConfig, weights: Mapping[str, torch.Tensor], kernels: Kernels, index: int, shared: bool
) -> PackedLayer:
    """``shared``: several ranks add up what ``out`` and ``down`` give; then only rank 0 has their biases."""
    prefix = f"model.layers.{index}"

    def weight(name: str) -> torch.Tensor:
        return weights[f"{prefix}.{name}.weight"]

    def place(name: str) -> torch.Tensor:
        return kernels.place(weight(name))

    def bias(name: str, present: bool) -> torch.Tensor | None:
        return weights[f"{prefix}.{name}.bias"] if present else None

    def bias_of_sum(name: str, present: bool) -> torch.Tensor | None:
        return bias(name, present and (not shared or f"{prefix}.{name}.bias" in weights))

    names = [f"self_attn.{part}_proj" for part in "qkv"]
    qkv_bias = torch.cat([weights[f"{prefix}.{name}.bias"] for name in names]) if config.qkv_bias else None
    norms = (place("self_attn.q_norm"), place("self_attn.k_norm")) if config.qk_norm else None
    return PackedLayer(
        input_norm=place("input_layernorm"),
        qkv=kernels.pack(torch.cat([weight(name) for name in names]), qkv_bias),
        qk_norms=norms,
        out=kernels.pack(weight("self_attn.o_proj"), bias_of_sum("self_attn.o_proj", config.out_bias), wide=shared),
        mlp_norm=place("post_attention_layernorm"),
        gate_up=kernels.pack_gated(
            weight("mlp.gate_proj"),
            weight("mlp.up_proj"),
            bias("mlp.gate_proj", config.mlp_bias),
            bias("mlp.up_proj", config.mlp_bias),
        ),
        down=kernels.pack(weight("mlp.down_proj"), bias_of_sum("mlp.down_proj", config.mlp_bias), wide=shared),
    )


def _rope_tables(config: DecoderConfig, num_positions: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines as the stock model rounds them: angles in fp32, results in the model's dtype.

    Computed in chunks of one shape, so that a position's values do not depend on how many positions there are.
    """
    inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32)
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    tables: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, num_positions, ROPE_CHUNK):
        angles = torch.arange(start, start + ROPE_CHUNK, dtype=torch.float32)[:, None] * inv_freq
        scaled = (angles.cos() * config.rope_scaling, angles.sin() * config.rope_scaling)
        tables.append((scaled[0].to(dtype).to(stored), scaled[1].to(dtype).to(stored)))
    cos, sin = (torch.cat(parts)[:num_positions].contiguous() for parts in zip(*tables))
    return cos, sin

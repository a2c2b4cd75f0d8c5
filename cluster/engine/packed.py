"""A model's weights as kernels want them: packed matrices, norms, rotary tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in a kernel's own layout. ``gated``: gate and up in one; the result is silu(gate) * up.

    ``wide``: the result keeps the dtype sums are computed in, fp32 or fp64 (the LM head, and what ranks add up).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    outputs: int
    gated: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of the attention, its per-head norms (Qwen3) and the rotary tables.

    cos, sin: (positions, head_dim / 2), fp32 holding values rounded to the model's dtype (fp64 in an fp64 model).
    """

    num: int
    num_kv: int
    dim: int
    eps: float
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """``qk_norms``: per-head norm weights of queries and keys, each (head_dim,); Qwen3 only."""

    input_norm: torch.Tensor
    qkv: PackedLinear
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None
    out: PackedLinear
    mlp_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True, slots=True)
class PackedModel:
    """embedding: (vocab, hidden) in the model's dtype; head: (vocab, hidden), wide. Of a shard: its heads, its share of
    the MLP's width and of the vocabulary."""

    embedding: torch.Tensor
    layers: tuple[PackedLayer, ...]
    final_norm: torch.Tensor
    head: PackedLinear
    heads: Heads

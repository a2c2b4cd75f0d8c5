"""A model's weights as kernels want them: packed matrices, norms, rotary tables."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """Adds outer(inner(x)) to what a linear of x gives, before it is rounded or gated.

    inner: rank outputs; outer: packed as the linear itself, without biases.
    """

    inner: PackedLinear
    outer: PackedLinear


class Form(IntEnum):
    """Fewer bits that bf16 weights are kept in: twelve (``twelve_bits.h``), or codes they come from (``affine.h``)."""

    TWELVE_BITS = 1
    FOUR_BITS = 2
    EIGHT_BITS = 3


@dataclass(frozen=True, slots=True)
class Codes:
    """What a weight in fewer bits needs to be read.

    Of one in twelve bits, upper: (16,) uint8; strays: (n,) int64, one each; starts: (blocks,) int32.
    """

    form: Form
    upper: torch.Tensor | None = None
    strays: torch.Tensor | None = None
    starts: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in a kernel's own layout. ``gated``: gate and up in one; the result is silu(gate) * up.

    ``codes``: of a weight kept in fewer bits, without loss.
    ``wide``: the result keeps the dtype sums are computed in, fp32 or fp64 (the LM head, and what ranks add up).
    ``adapter``: of a drafter's view of a target; the weight itself is the target's.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    outputs: int
    gated: bool = False
    wide: bool = False
    adapter: LowRank | None = None
    codes: Codes | None = None


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
    the MLP's width and of the vocabulary. masks: (masks, hidden), what token ids from vocab on are embedded as, in a
    drafter's view."""

    embedding: torch.Tensor
    layers: tuple[PackedLayer, ...]
    final_norm: torch.Tensor
    head: PackedLinear
    heads: Heads
    masks: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """A residual SwiGLU block of ``PackedMlpHead``."""

    norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True, slots=True)
class PackedMlpHead:
    """The network that guesses on from a target's hidden states (``drafters/mlp_head.py``).

    embedding: the target's, (vocab, hidden); mix: of 2 * hidden inputs; head: (head tokens, hidden), wide.
    """

    embedding: torch.Tensor
    state_norm: torch.Tensor
    token_norm: torch.Tensor
    mix: PackedLinear
    blocks: tuple[PackedBlock, ...]
    final_norm: torch.Tensor
    head: PackedLinear
    eps: float

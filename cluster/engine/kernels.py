"""What the decoder computes with: the ``Kernels`` interface, and the choice between its two implementations.

Contract of every method: a row's result is bit-equal whatever other rows are in the call (docs/exactness.md). The
native form (``kernels_native.py``, ``kernels.cpp``) is fast; the torch form runs in any dtype and without a compiler.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch

from cluster.core.errors import ConfigError
from cluster.engine.rows import StepRows

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in a kernel's own layout. ``gated``: gate and up in one; the result is silu(gate) * up.

    ``wide``: the result is fp32 whatever the dtype (the LM head).
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


class Kernels(Protocol):
    """Row-wise operations; activations are (n, width) contiguous tensors of ``dtype``, weights as packed here."""

    name: str
    dtype: torch.dtype

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, wide: bool = False) -> PackedLinear:
        """weight: (outputs, inputs); bias: (outputs,)."""
        ...

    def pack_gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> PackedLinear:
        """gate, up: (outputs, inputs)."""
        ...

    def linear(self, x: torch.Tensor, packed: PackedLinear, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(n, inputs) -> (n, outputs); ``residual`` (n, outputs) is added to the rounded result."""
        ...

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMS norm of each row: rounded after scaling to unit size, and again after the weight."""
        ...

    def rope_store(
        self,
        qkv: torch.Tensor,
        heads: Heads,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        step: StepRows,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """qkv: (n, (heads + 2 * kv_heads) * dim). Norms and rotates queries in place; writes keys and values.

        norms: per-head weights of queries and keys, each (dim,). keys, values: one layer of the cache.
        """
        ...

    def attention(
        self, qkv: torch.Tensor, heads: Heads, step: StepRows, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Each row over its prefix, its ancestors and itself, in position order: (n, heads * dim)."""
        ...


def choose_kernels(choice: str, dtype: str, threads: int = 0) -> Kernels:
    """``auto``: native where the dtype, the CPU and a compiler allow it, torch otherwise. Logs the choice and why.

    Raises ``ConfigError`` where native kernels are demanded but cannot be had, or a name is unknown.
    """
    from cluster.engine.kernels_native import NativeKernels, NativeUnavailable
    from cluster.engine.kernels_torch import TorchKernels

    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not supported; allowed: {', '.join(DTYPES)}")
    if choice not in ("auto", "native", "torch"):
        raise ConfigError(f"kernels: {choice!r} is not supported; allowed: auto, native, torch")
    reason = "asked for"
    if choice != "torch":
        try:
            kernels = NativeKernels(DTYPES[dtype], threads or torch.get_num_threads())
        except NativeUnavailable as error:
            if choice == "native":
                raise ConfigError(f"kernels: native cannot be used: {error}; allowed here: auto, torch") from error
            reason = str(error)
        else:
            logger.info("kernels: %s, %s, %d threads", kernels.name, dtype, kernels.threads)
            return kernels
    logger.info("kernels: torch, %s (%s)", dtype, reason)
    return TorchKernels(DTYPES[dtype])

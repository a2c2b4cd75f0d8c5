"""What the decoder computes with: the ``Kernels`` interface, and the choice between its two implementations.

Contract: a row's result is bit-equal whatever other rows are in the step (docs/exactness.md). The torch form
(``kernels_torch.py``) runs in any dtype and without a compiler, and reads as the definition of the decoder; the native
form (``kernels_native.py``, ``kernels.cpp``) computes the same in one call, fast.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch

from cluster.core.errors import ConfigError
from cluster.engine.kv_store import KVStore
from cluster.engine.packed import PackedLinear, PackedMlpHead, PackedModel
from cluster.engine.rows import StepRows

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


Forward = Callable[[StepRows, KVStore, frozenset[int], torch.Tensor | None], torch.Tensor]
"""(step, cache, sub-layers to skip, features) -> logits of the wanted rows, (wanted, vocab) fp32.

Keys and values are written into the cache. ``features``, where given, gets what the head saw: (wanted, hidden), behind
the final norm, in the model's dtype.
"""


class MlpForward(Protocol):
    """A ``PackedMlpHead`` at work. tokens: (n,) int64; states: (n, hidden) in the model's dtype."""

    def advance(self, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The states behind one more token each."""
        ...

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """What follows each state: (n, head tokens) fp32."""
        ...


class ShardStep(Protocol):
    """One step of a model's shard, in the parts between which the ranks meet. hidden: (n, hidden), the same on all."""

    def addend(self, sub_layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The rank's addend to what the sub-layer adds to the residual: (n, hidden), in the dtype sums are kept in.

        Writes the keys and values of the rank's heads.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The wanted rows' logits for the rank's share of the vocabulary: (wanted, share) fp32."""
        ...


class Kernels(Protocol):
    """Packs weights, and computes with what it packed."""

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

    def forward_of(self, model: PackedModel) -> Forward:
        """The forward pass over a model packed by these kernels."""
        ...

    def mlp_of(self, model: PackedMlpHead) -> MlpForward:
        """The same for the network that guesses on from hidden states."""
        ...

    def shard_of(self, model: PackedModel) -> Callable[[StepRows, KVStore], ShardStep]:
        """The steps of a shard, whose layers' ``out`` and ``down`` are packed wide."""
        ...


def choose_kernels(choice: str, dtype: str, threads: int = 0) -> Kernels:
    """``auto``: native where the dtype, the CPU and a compiler allow it, torch otherwise. Logs the choice and why.

    Raises ``ConfigError`` where native kernels are demanded but cannot be had, or a name is unknown.
    """
    from cluster.core.native_build import NativeUnavailable
    from cluster.engine.kernels_native import NativeKernels
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

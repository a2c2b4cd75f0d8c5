"""What the decoder computes with: the ``Kernels`` interface, and the choice among its implementations.

Contract: a row's result is bit-equal whatever other rows are in the step (docs/exactness.md). The torch form
(``kernels_torch.py``) runs in any dtype and without a compiler, and reads as the definition of the decoder; the native
form (``kernels_native.py``, ``kernels.cpp``) computes the same in one call, fast; ``kernels_triton.py`` is for GPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch

from cluster.core.errors import ConfigError
from cluster.engine.kv_store import KVStore
from cluster.engine.packed import LowRank, PackedLinear, PackedMlpHead, PackedModel
from cluster.engine.rows import StepRows

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


Forward = Callable[[StepRows, KVStore, frozenset[int], torch.Tensor | None], torch.Tensor]
"""(step, cache, sub-layers to skip, features) -> logits of the wanted rows, (wanted, vocab) fp32.

Keys and values are written into the cache. ``features``, where given, gets what the head saw: (wanted, hidden), behind
the final norm, in the model's dtype.
"""


class KernelsUnavailable(Exception):
    """Why kernels cannot be used here."""


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the CPU, once what computes it is done. By way of pinned memory, since a pageable copy is several
    times slower; torch keeps it for the next step."""
    if not tensor.is_cuda:
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


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
    """Packs weights, and computes with what it packed.

    device: where weights, keys and values are, and what ranks exchange. Steps come from the CPU, logits go back there.
    """

    name: str
    dtype: torch.dtype
    device: torch.device

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A vector or table of the model where these kernels read it."""
        ...

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

    def pack_adapter(self, inner: torch.Tensor, outer: torch.Tensor, *, gated: bool) -> LowRank:
        """inner: (rank, inputs); outer: (outputs, rank), the gate's outputs before those of up where ``gated``."""
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


def choose_kernels(choice: str, dtype: str, threads: int = 0, rank: int = 0) -> Kernels:
    """``auto``: Triton's where there is a GPU, native where dtype, CPU and compiler allow it, else torch. Logs it.

    ``rank``: of several that share a model, each with a GPU of its own. Raises ``ConfigError`` where the kernels that
    are demanded cannot be had, or a name is unknown.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not supported; allowed: {', '.join(DTYPES)}")
    if choice not in ("auto", *_MAKERS):
        raise ConfigError(f"kernels: {choice!r} is not supported; allowed: auto, {', '.join(_MAKERS)}")
    threads = threads or torch.get_num_threads()
    # Triton's interpreter is for tests that ask for it by name.
    preferred = [name for name in _MAKERS if name != "triton" or torch.cuda.is_available()]
    reasons = ""
    for name in preferred if choice == "auto" else [choice]:
        try:
            kernels = _MAKERS[name](DTYPES[dtype], threads, rank)
        except KernelsUnavailable as error:
            reasons += f" ({name} cannot be used: {error})"
        else:
            log.info("kernels: %s, %s, %d CPU threads%s", name, dtype, threads, reasons)
            return kernels
    raise ConfigError(f"kernels:{reasons}; allowed here: auto, torch")


def _triton(dtype: torch.dtype, threads: int, rank: int) -> Kernels:
    try:
        from cluster.engine.kernels_triton import TritonKernels
    except ImportError as error:
        raise KernelsUnavailable(str(error)) from error
    return TritonKernels(dtype, rank)


def _native(dtype: torch.dtype, threads: int, rank: int) -> Kernels:
    from cluster.core.native_build import NativeUnavailable
    from cluster.engine.kernels_native import NativeKernels

    try:
        return NativeKernels(dtype, threads)
    except NativeUnavailable as error:
        raise KernelsUnavailable(str(error)) from error


def _torch(dtype: torch.dtype, threads: int, rank: int) -> Kernels:
    from cluster.engine.kernels_torch import TorchKernels

    return TorchKernels(dtype)


_MAKERS: dict[str, Callable[[torch.dtype, int, int], Kernels]] = {
    "triton": _triton,
    "native": _native,
    "torch": _torch,
}

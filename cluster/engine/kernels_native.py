"""``kernels.cpp`` from Python: weights packed for it, and calls through ctypes, which drops the GIL.

A step is one call; of a model's shard, whose ranks meet after every sub-layer, a call per sub-layer.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from cluster.core.native_build import NativeUnavailable, build_library
from cluster.engine.cpu import cpu_flags
from cluster.engine.huge_pages import Arena
from cluster.engine.kernels import Forward, MlpForward, ShardStep
from cluster.engine.kv_store import KVStore
from cluster.engine.packed import Codes, LowRank, PackedLayer, PackedLinear, PackedMlpHead, PackedModel
from cluster.engine.rows import StepRows
from cluster.engine.weight_forms import smallest

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in (
        *("kernels.cpp", "affine.h", "attention.h", "linear.h", "mlp_head.h"),
        *("norm.h", "simd.h", "team.h", "twelve_bits.h"),
    )
)
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-pthread", "-fPIC", "-shared", "-Wno-psabi")
BLOCK = 16
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Matrix(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "upper", "strays", "starts", "bias", "inner", "outer")),
        ("rank", c_int32),
        ("form", c_int32),
    )


class _Layer(Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("qkv", _Matrix),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("out", _Matrix),
        ("mlp_norm", c_void_p),
        ("gate_up", _Matrix),
        ("down", _Matrix),
    )


class _Model(Structure):
    _fields_ = (
        ("embedding", c_void_p),
        ("masks", c_void_p),
        ("layers", POINTER(_Layer)),
        ("final_norm", c_void_p),
        ("head", _Matrix),
        ("cos", c_void_p),
        ("sin", c_void_p),
        *((name, c_int32) for name in ("num_layers", "hidden", "inner", "heads", "kv_heads", "dim")),
        *((name, c_int32) for name in ("vocab", "head_size")),
        ("eps", c_float),
    )


class _MlpBlock(Structure):
    _fields_ = (("norm", c_void_p), ("gate_up", _Matrix), ("down", _Matrix))


class _MlpHead(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("embedding", "state_norm", "token_norm")),
        ("mix", _Matrix),
        ("blocks", POINTER(_MlpBlock)),
        ("final_norm", c_void_p),
        ("head", _Matrix),
        *((name, c_int32) for name in ("num_blocks", "hidden", "inner", "head_size")),
        ("eps", c_float),
    )


class _Step(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("tokens", "slots", "prefixes", "positions", "cache_rows")),
        *((name, c_void_p) for name in ("paths", "path_lengths", "wanted", "cache", "features")),
        ("slot_size", c_int64),
        ("num_positions", c_int64),
        *((name, c_int32) for name in ("rows", "path_width", "num_wanted")),
    )


def _usable_flags() -> frozenset[str]:
    flags = cpu_flags()
    if platform.machine() != "x86_64" or not flags:
        raise NativeUnavailable(f"they are built for x86_64 Linux, this is {platform.system()} {platform.machine()}")
    if not {"avx2", "fma"} <= flags:
        raise NativeUnavailable("the CPU has no AVX2 with FMA")
    return flags


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(build_library(SOURCES, FLAGS, sorted(_usable_flags()))))
    except OSError as error:
        raise NativeUnavailable(f"the compiled library does not load: {error}") from error


def _pad(tensor: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    missing = -tensor.shape[dim] % multiple
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _matrix(packed: PackedLinear) -> _Matrix:
    codes, adapter = packed.codes, packed.adapter
    reading = (codes.upper, codes.strays, codes.starts) if codes else (None, None, None)
    low_rank = (adapter.inner.weight, adapter.outer.weight) if adapter else (None, None)
    addresses = map(_address, (packed.weight, *reading, packed.bias, *low_rank))
    return _Matrix(*addresses, adapter.inner.outputs if adapter else 0, codes.form if codes else 0)


def _layer(layer: PackedLayer) -> _Layer:
    q_norm, k_norm = layer.qk_norms or (None, None)
    return _Layer(
        _address(layer.input_norm),
        _matrix(layer.qkv),
        _address(q_norm),
        _address(k_norm),
        _matrix(layer.out),
        _address(layer.mlp_norm),
        _matrix(layer.gate_up),
        _matrix(layer.down),
    )


class NativeKernels:
    """``Kernels`` for fp32 and bf16. Raises ``NativeUnavailable`` where they cannot be built, or not in that dtype."""

    def __init__(self, dtype: torch.dtype, threads: int) -> None:
        if dtype not in SUFFIXES:
            raise NativeUnavailable(f"they compute in {', '.join(str(kind) for kind in SUFFIXES)}, not {dtype}")
        self.name = "native"
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.threads = threads
        self._arena = Arena()
        self._decodes = dtype == torch.bfloat16 and bool(_library().can_decode())
        self._forward = self._function("forward", c_void_p, c_void_p)
        self._sub_layer = self._function("sub_layer", c_int, c_void_p, c_void_p)
        self._head = self._function("head", c_void_p, c_void_p)

    def _function(self, name: str, *arguments: Any, of: Sequence[Any] = (_Model, _Step)) -> Any:
        function = getattr(_library(), f"{name}_{SUFFIXES[self.dtype]}")
        function.argtypes = [*map(POINTER, of), *arguments, c_int]
        function.restype = None
        return function

    def _blocks(self, weight: torch.Tensor) -> torch.Tensor:
        """(outputs, inputs) -> (blocks, steps, 16, 1 in fp32 or 2 in bf16)."""
        pair = 4 // self.dtype.itemsize
        weight = _pad(_pad(weight.to(self.dtype), 0, BLOCK), 1, pair)
        return weight.view(-1, BLOCK, weight.shape[1] // pair, pair).transpose(1, 2)

    def _gated_blocks(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._blocks(gate), self._blocks(up)], 1).flatten(0, 1)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous()

    def _placed(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Codes | None]:
        """Blocks where a step reads them, in the smallest form that can be read here."""
        weight, codes = smallest(_library(), blocks) if self._decodes else (blocks, None)
        return self._arena.place(weight), codes

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, wide: bool = False) -> PackedLinear:
        padded_bias = None if bias is None else _pad(bias.float(), 0, BLOCK).contiguous()
        placed, codes = self._placed(self._blocks(weight))
        return PackedLinear(placed, padded_bias, weight.shape[0], wide=wide, codes=codes)

    def pack_gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> PackedLinear:
        placed, codes = self._placed(self._gated_blocks(gate, up))
        bias = None
        if gate_bias is not None and up_bias is not None:
            both = [_pad(part.float(), 0, BLOCK).view(-1, BLOCK) for part in (gate_bias, up_bias)]
            bias = torch.stack(both, 1).flatten().contiguous()
        return PackedLinear(placed, bias, gate.shape[0], gated=True, codes=codes)

    def pack_adapter(self, inner: torch.Tensor, outer: torch.Tensor, *, gated: bool) -> LowRank:
        # As they are: they are narrow, and caches hold them.
        blocks = self._gated_blocks(*outer.chunk(2)) if gated else self._blocks(outer)
        outputs = outer.shape[0] // 2 if gated else outer.shape[0]
        narrow = PackedLinear(self._arena.place(self._blocks(inner)), None, inner.shape[0])
        return LowRank(narrow, PackedLinear(self._arena.place(blocks), None, outputs, gated=gated))

    def forward_of(self, model: PackedModel) -> Forward:
        return _NativeForward(_NativeModel(model), self._forward, self.threads)

    def mlp_of(self, model: PackedMlpHead) -> MlpForward:
        advance = self._function("mlp_advance", c_void_p, c_void_p, c_void_p, c_int, of=(_MlpHead,))
        logits = self._function("mlp_logits", c_void_p, c_void_p, c_int, of=(_MlpHead,))
        return _NativeMlp(model, advance, logits, self.threads)

    def shard_of(self, model: PackedModel) -> Callable[[StepRows, KVStore], ShardStep]:
        native = _NativeModel(model)
        return lambda step, kv: _NativeShardStep(native, step, kv, self._sub_layer, self._head, self.threads)


class _NativeModel:
    """A model's addresses, laid out once for all steps. Keeps the model, and with it the memory, alive."""

    def __init__(self, model: PackedModel) -> None:
        self._model = model
        heads = model.heads
        self._layers = (_Layer * len(model.layers))(*map(_layer, model.layers))
        self.head_size = model.head.outputs
        self.num_layers = len(model.layers)
        self.struct = _Model(
            _address(model.embedding),
            _address(model.masks),
            self._layers,
            _address(model.final_norm),
            _matrix(model.head),
            _address(heads.cos),
            _address(heads.sin),
            self.num_layers,
            model.embedding.shape[1],
            model.layers[0].gate_up.outputs,
            heads.num,
            heads.num_kv,
            heads.dim,
            model.embedding.shape[0],
            self.head_size,
            heads.eps,
        )


def _step(step: StepRows, kv: KVStore, wanted: torch.Tensor, features: torch.Tensor | None = None) -> _Step:
    return _Step(
        *map(_address, (step.tokens, step.slots, step.prefixes, step.positions, step.cache_rows)),
        *map(_address, (step.paths, step.path_lengths, wanted, kv.keys[0], features)),
        kv.slot_size,
        kv.num_slots * kv.slot_size,
        len(step),
        step.paths.shape[1],
        len(wanted),
    )


def _wanted(step: StepRows) -> torch.Tensor:
    return _all_rows(len(step)) if step.wanted is None else step.wanted


@functools.lru_cache(maxsize=1024)
def _all_rows(count: int) -> torch.Tensor:
    return torch.arange(count)


class _NativeForward:
    """A whole step in one call."""

    def __init__(self, model: _NativeModel, call: Any, threads: int) -> None:
        self._model, self._call, self._threads = model, call, threads

    def __call__(
        self, step: StepRows, kv: KVStore, skip: frozenset[int], features: torch.Tensor | None
    ) -> torch.Tensor:
        wanted = _wanted(step)
        logits = torch.empty((len(wanted), self._model.head_size))
        flags = bytes(index in skip for index in range(2 * self._model.num_layers))
        native = _step(step, kv, wanted, features)
        self._call(self._model.struct, native, flags, logits.data_ptr(), self._threads)
        return logits


class _NativeMlp:
    """A step of the network, and its head, in a call each. Keeps the model, and with it the memory, alive."""

    def __init__(self, model: PackedMlpHead, advance: Any, logits: Any, threads: int) -> None:
        self._model, self._advance, self._logits, self._threads = model, advance, logits, threads
        blocks = [_MlpBlock(_address(b.norm), _matrix(b.gate_up), _matrix(b.down)) for b in model.blocks]
        self._blocks = (_MlpBlock * len(blocks))(*blocks)
        self._struct = _MlpHead(
            *map(_address, (model.embedding, model.state_norm, model.token_norm)),
            _matrix(model.mix),
            self._blocks,
            _address(model.final_norm),
            _matrix(model.head),
            len(blocks),
            model.embedding.shape[1],
            model.blocks[0].gate_up.outputs,
            model.head.outputs,
            model.eps,
        )

    def advance(self, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        following = torch.empty_like(states)
        addresses = tokens.data_ptr(), states.data_ptr(), following.data_ptr()
        self._advance(self._struct, *addresses, len(tokens), self._threads)
        return following

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        logits = torch.empty((len(states), self._model.head.outputs))
        self._logits(self._struct, states.data_ptr(), logits.data_ptr(), len(states), self._threads)
        return logits


class _NativeShardStep:
    """One step of a shard, a call per sub-layer. Keeps the step's arrays alive."""

    def __init__(
        self, model: _NativeModel, step: StepRows, kv: KVStore, sub_layer: Any, head: Any, threads: int
    ) -> None:
        self._model, self._sub_layer, self._head, self._threads = model, sub_layer, head, threads
        self._rows, self._wanted = step, _wanted(step)
        self._step = _step(step, kv, self._wanted)

    def addend(self, sub_layer: int, hidden: torch.Tensor) -> torch.Tensor:
        result = torch.empty(hidden.shape)
        addresses = hidden.data_ptr(), result.data_ptr()
        self._sub_layer(self._model.struct, self._step, sub_layer, *addresses, self._threads)
        return result

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        result = torch.empty((len(self._wanted), self._model.head_size))
        self._head(self._model.struct, self._step, hidden.data_ptr(), result.data_ptr(), self._threads)
        return result

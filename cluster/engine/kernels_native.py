"""``kernels.cpp`` from Python: weights packed for it, and a step as one call through ctypes, which drops the GIL."""

from __future__ import annotations

import ctypes
import functools
import platform
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from cluster.engine.huge_pages import Arena
from cluster.engine.kernels import Forward
from cluster.engine.kv_cache import KVCache
from cluster.engine.native_build import NativeUnavailable, build_library
from cluster.engine.packed import PackedLayer, PackedLinear, PackedModel
from cluster.engine.rows import StepRows

SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("kernels.cpp", "attention.h", "linear.h", "pool.h", "simd.h")
)
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-pthread", "-fPIC", "-shared", "-Wno-psabi")
BLOCK = 16
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Matrix(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


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
        ("layers", POINTER(_Layer)),
        ("final_norm", c_void_p),
        ("head", _Matrix),
        ("cos", c_void_p),
        ("sin", c_void_p),
        *((name, c_int32) for name in ("num_layers", "hidden", "inner", "heads", "kv_heads", "dim", "vocab")),
        ("eps", c_float),
    )


class _Step(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("tokens", "slots", "prefixes", "positions", "cache_rows")),
        *((name, c_void_p) for name in ("paths", "path_lengths", "wanted", "cache")),
        ("slot_size", c_int64),
        ("num_positions", c_int64),
        *((name, c_int32) for name in ("rows", "path_width", "num_wanted")),
    )


def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.is_file():
        raise NativeUnavailable(f"they are built for x86_64 Linux, this is {platform.system()} {platform.machine()}")
    line = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
    flags = frozenset(line.split())
    if not {"avx2", "fma"} <= flags:
        raise NativeUnavailable("the CPU has no AVX2 with FMA")
    return flags


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(build_library(SOURCES, FLAGS, sorted(_cpu_flags()))))
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
    return _Matrix(_address(packed.weight), _address(packed.bias))


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
        self.threads = threads
        self._arena = Arena()
        self._call = getattr(_library(), f"forward_{SUFFIXES[dtype]}")
        self._call.argtypes = [POINTER(_Model), POINTER(_Step), c_void_p, c_void_p, c_int]
        self._call.restype = None

    def _blocks(self, weight: torch.Tensor) -> torch.Tensor:
        """(outputs, inputs) -> (blocks, steps, 16, 1 in fp32 or 2 in bf16)."""
        pair = 4 // self.dtype.itemsize
        weight = _pad(_pad(weight.to(self.dtype), 0, BLOCK), 1, pair)
        return weight.view(-1, BLOCK, weight.shape[1] // pair, pair).transpose(1, 2)

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, wide: bool = False) -> PackedLinear:
        padded_bias = None if bias is None else _pad(bias.float(), 0, BLOCK).contiguous()
        return PackedLinear(self._arena.place(self._blocks(weight)), padded_bias, weight.shape[0], wide=wide)

    def pack_gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> PackedLinear:
        weight = torch.stack([self._blocks(gate), self._blocks(up)], 1).flatten(0, 1)
        bias = None
        if gate_bias is not None and up_bias is not None:
            both = [_pad(part.float(), 0, BLOCK).view(-1, BLOCK) for part in (gate_bias, up_bias)]
            bias = torch.stack(both, 1).flatten().contiguous()
        return PackedLinear(self._arena.place(weight), bias, gate.shape[0], gated=True)

    def forward_of(self, model: PackedModel) -> Forward:
        return _NativeForward(model, self._call, self.threads)


class _NativeForward:
    """A model's addresses, laid out once for all steps. Keeps the model, and with it the memory, alive."""

    def __init__(self, model: PackedModel, call: Any, threads: int) -> None:
        self._model, self._call, self._threads = model, call, threads
        heads, inner = model.heads, model.layers[0].gate_up.outputs
        self._layers = (_Layer * len(model.layers))(*map(_layer, model.layers))
        self._native = _Model(
            _address(model.embedding),
            self._layers,
            _address(model.final_norm),
            _matrix(model.head),
            _address(heads.cos),
            _address(heads.sin),
            len(model.layers),
            model.embedding.shape[1],
            inner,
            heads.num,
            heads.num_kv,
            heads.dim,
            model.vocab_size,
            heads.eps,
        )

    def __call__(self, step: StepRows, kv: KVCache, skip: frozenset[int]) -> torch.Tensor:
        rows = len(step)
        wanted = torch.arange(rows) if step.wanted is None else step.wanted
        logits = torch.empty((len(wanted), self._model.vocab_size))
        native = _Step(
            *map(_address, (step.tokens, step.slots, step.prefixes, step.positions, step.cache_rows)),
            *map(_address, (step.paths, step.path_lengths, wanted, kv.keys[0])),
            kv.slot_size,
            kv.num_slots * kv.slot_size,
            rows,
            step.paths.shape[1],
            len(wanted),
        )
        flags = bytes(index in skip for index in range(2 * len(self._model.layers)))
        self._call(self._native, native, flags, logits.data_ptr(), self._threads)
        return logits

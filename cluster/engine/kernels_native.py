"""``kernels.cpp`` from Python: built once per source, flags and CPU, called through ctypes (which drops the GIL)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from cluster.engine.disk_cache import cache_folder
from cluster.engine.kernels import Heads, PackedLinear
from cluster.engine.rows import StepRows

logger = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "pool.h", "simd.h"))
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-pthread", "-fPIC", "-shared", "-Wno-psabi")
BLOCK = 16
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
ARENA_BYTES = 128 << 20

_PTR, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "linear": [_PTR, _INT, _INT, _PTR, _PTR, _PTR, _PTR, _INT, _INT, _INT, _INT],
    "norm": [_PTR, _PTR, _PTR, _INT, _INT, _FLOAT],
    "rope_store": [_PTR, *[_INT] * 4, _PTR, _PTR, _FLOAT, *[_PTR] * 6],
    "attention": [*[_PTR] * 4, *[_INT] * 4, _LONG, *[_PTR] * 3, _INT, _PTR, _FLOAT, _INT],
}


class NativeUnavailable(Exception):
    """The native kernels cannot run here; the message says why."""


def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.is_file():
        raise NativeUnavailable(f"they are built for x86_64 Linux, this is {platform.system()} {platform.machine()}")
    line = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
    flags = frozenset(line.split())
    if not {"avx2", "fma"} <= flags:
        raise NativeUnavailable("the CPU has no AVX2 with FMA")
    return flags


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise NativeUnavailable(f"{command[0]} failed: {result.stderr.strip()[:500]}")


def build_library() -> Path:
    """Compile ``kernels.cpp`` into the cache unless it is there. Raises ``NativeUnavailable``.

    Processes that build at once each rename a finished file into place, so none ever loads half of one.
    """
    flags = _cpu_flags()
    key = [*(source.read_text() for source in SOURCES), *FLAGS, *sorted(flags)]
    target = cache_folder("kernels") / f"{hashlib.sha256(chr(10).join(key).encode()).hexdigest()[:20]}.so"
    if target.exists():
        return target
    compiler = shutil.which("g++")
    if compiler is None:
        raise NativeUnavailable("no g++ was found")
    logger.info("kernels: compiling %s", SOURCES[0].name)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        library = f"{work}/kernels.so"
        _run([compiler, *FLAGS, str(SOURCES[0]), "-o", library])
        os.replace(library, target)
    return target


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(build_library()))
    except OSError as error:
        raise NativeUnavailable(f"the compiled library does not load: {error}") from error


class _Arena:
    """Weights on huge pages: a step walks through all of them, more than 4 KiB page tables keep at hand."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def place(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of ``weight`` at a 64-byte boundary."""
        size = weight.numel() * weight.element_size()
        padded = (size + 63) // 64 * 64
        if padded > self._free.numel():
            region = mmap.mmap(-1, max(ARENA_BYTES, padded))
            region.madvise(mmap.MADV_HUGEPAGE)
            self._free = torch.frombuffer(region, dtype=torch.uint8)
        room, self._free = self._free[:size], self._free[padded:]
        placed = room.view(weight.dtype).view(weight.shape)
        placed.copy_(weight)
        return placed


def _pad(tensor: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    missing = -tensor.shape[dim] % multiple
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class NativeKernels:
    """``Kernels`` for fp32 and bf16. Raises ``NativeUnavailable`` where they cannot be built, or not in that dtype."""

    def __init__(self, dtype: torch.dtype, threads: int) -> None:
        if dtype not in SUFFIXES:
            raise NativeUnavailable(f"they compute in {', '.join(str(kind) for kind in SUFFIXES)}, not {dtype}")
        library = _library()
        self.name = "native"
        self.dtype = dtype
        self.threads = threads
        self._arena = _Arena()
        functions = {name: getattr(library, f"{name}_{SUFFIXES[dtype]}") for name in SIGNATURES}
        for name, function in functions.items():
            function.argtypes, function.restype = SIGNATURES[name], None
        self._linear, self._norm = functions["linear"], functions["norm"]
        self._rope_store, self._attention = functions["rope_store"], functions["attention"]

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

    def linear(self, x: torch.Tensor, packed: PackedLinear, residual: torch.Tensor | None = None) -> torch.Tensor:
        rows, inputs = x.shape
        out = torch.empty((rows, packed.outputs), dtype=torch.float32 if packed.wide else self.dtype)
        self._linear(
            x.data_ptr(),
            rows,
            inputs,
            packed.weight.data_ptr(),
            _address(packed.bias),
            _address(residual),
            out.data_ptr(),
            packed.outputs,
            packed.wide,
            packed.gated,
            self.threads,
        )
        return out

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty_like(x)
        self._norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
        return out

    def rope_store(
        self,
        qkv: torch.Tensor,
        heads: Heads,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        step: StepRows,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        q_norm, k_norm = norms or (None, None)
        self._rope_store(
            qkv.data_ptr(),
            len(step),
            heads.num,
            heads.num_kv,
            heads.dim,
            _address(q_norm),
            _address(k_norm),
            heads.eps,
            heads.cos.data_ptr(),
            heads.sin.data_ptr(),
            step.positions.data_ptr(),
            step.cache_rows.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
        )

    def attention(
        self, qkv: torch.Tensor, heads: Heads, step: StepRows, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty((len(step), heads.num * heads.dim), dtype=self.dtype)
        self._attention(
            qkv.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            len(step),
            heads.num,
            heads.num_kv,
            heads.dim,
            keys.shape[1],
            step.slots.data_ptr(),
            step.prefixes.data_ptr(),
            step.paths.data_ptr(),
            step.paths.shape[1],
            step.path_lengths.data_ptr(),
            heads.dim**-0.5,
            self.threads,
        )
        return out

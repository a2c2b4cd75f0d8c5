"""Compiles the Triton kernels to machine code for several GPUs, which takes none: a line for each that succeeded."""

from __future__ import annotations

import itertools
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cluster.engine import kernels_triton as kernels

GENERATIONS = (80, 90)  # A100, H100 and H200
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # that a block may have
SIZES = {
    "inputs",
    "outputs",
    "gate_stride",
    "outer_gate_stride",
    "width",
    "heads",
    "dim",
    "slot_size",
}  # multiples of 16
FLOATS = {"eps", "scale"}
TABLES = {"positions", "cache_rows", "slots", "prefixes", "path_lengths", "paths"}
TENSORS = {"x", "weight", "bias", "narrow", "outer", "residual", "out", "qkv", "q_norm", "k_norm", "keys", "values"}
TILES: dict[str, dict[str, Any]] = {
    "bf16": {"TILE_M": 32, "TILE_N": 32, "TILE_K": 128},
    "fp32": {"TILE_M": 16, "TILE_N": 32, "TILE_K": 64},
}
PLAIN: dict[str, Any] = {"GATED": False, "BIAS": False, "RESIDUAL": True, "RANK": 0}
GATED: dict[str, Any] = {"GATED": True, "BIAS": True, "RESIDUAL": False, "RANK": 16}


def compile_one(kernel: Any, dtype: str, generation: int, constants: dict[str, Any], **kinds: str) -> None:
    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in TENSORS:
            return f"*{dtype}"
        return {**dict.fromkeys(FLOATS, "fp32"), **dict.fromkeys(TABLES, "*i64"), "cos": "*fp32", "sin": "*fp32"}.get(
            name, "i32"
        )

    signature = {name: kinds.get(name) or kind(name) for name in kernel.arg_names}
    # What a launch knows of its arguments decides which loads are wide and ahead of time, and so the memory they take.
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in SIZES]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32))
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_BYTES[generation]
    print(kernel.__name__, dtype, generation, compiled.metadata.shared, flush=True)


if __name__ == "__main__":
    for dtype, generation in itertools.product(TILES, GENERATIONS):
        for constants in (PLAIN, GATED):
            compile_one(kernels._linear, dtype, generation, {**constants, **TILES[dtype]})
        wide = {**TILES[dtype], **PLAIN, "RESIDUAL": False, "TILE_N": 128}
        compile_one(kernels._linear, dtype, generation, wide, out="*fp32", residual="*fp32")
        compile_one(kernels._norm, dtype, generation, {"WIDTH": 4096})
        compile_one(kernels._rope_store, dtype, generation, {"NORMS": True, "HALF": 64})
        compile_one(kernels._attention, dtype, generation, {"GROUP": 4, "QUERIES": 16, "DIM": 128, "BLOCK": 64})

"""The GPU form of the kernels, in Triton. Row-invariant because tiles are fixed by dtype and weight, never by rows.

A row's sums run over its inputs, or over its keys in position order, in tiles of one size, whatever stands beside it;
missing rows of a tile are zeros. Steps are padded to a few sizes, each of which becomes a CUDA graph once it has been
seen. Weights, keys and values live on the GPU; a step's rows go there in one copy, and logits come back.

Triton's interpreter runs the same kernels on a CPU (``TRITON_INTERPRET=1``): slowly, for tests. No GPU has run them
yet: tile sizes are chosen on paper.
"""

# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from cluster.engine.kernels import Forward, KernelsUnavailable, to_host
from cluster.engine.kernels_ops import OperatorKernels
from cluster.engine.kv_store import KVStore
from cluster.engine.packed import Heads, PackedLinear, PackedModel
from cluster.engine.rows import StepRows

TILE_ROWS = {torch.bfloat16: 32, torch.float32: 16}
TILE_INPUTS = {torch.bfloat16: 128, torch.float32: 64}
TILE_OUTPUTS, WIDE_TILE_OUTPUTS = 32, 128  # of weights with fewer outputs than WIDE_OUTPUTS, and of the others:
WIDE_OUTPUTS = 16_384  # enough tiles for every multiprocessor either way
KEY_BLOCK = 64
LEAST_TILE = 16  # of any side of a product
SIZES = (1, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)  # rows that a step is padded to
GRAPH_AFTER = 2  # steps of one shape run as they are; then they are captured ...
SKIP_GRAPH_AFTER = 32  # ... later with sub-layers skipped: a search tries many sets a few times
MAX_GRAPHS = 64
LEAST_CAPABILITY = (8, 0)  # bf16 products
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
COLUMNS, CACHE_ROW = 6, 4  # of a row on the device, before its path


@triton.jit
def _dot(a, b, total):
    """total + a @ b, in fp32."""
    if INTERPRETED:  # by NumPy, whose order of a row's fp32 sum depends on where the row stands, on some CPUs
        return total + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _rounded(x, kind: tl.constexpr):
    """fp32 ``x`` as an operation of the model's dtype would have left it."""
    return x.to(kind).to(tl.float32)


@triton.jit
def _add_products(
    first, second, x, weight, row, column, k, width, has_row, has_column, gate_stride, GATED: tl.constexpr
):  # fmt: skip
    """To ``first`` the product of a tile of x and one of the weight, rows of ``width``; to ``second`` the gated one."""
    a = tl.load(x + row * width + k[None, :], mask=has_row & (k[None, :] < width), other=0.0)
    at = weight + column * width + k[:, None]
    known = has_column & (k[:, None] < width)
    first = _dot(a, tl.load(at, mask=known, other=0.0), first)
    if GATED:
        second = _dot(a, tl.load(at + gate_stride, mask=known, other=0.0), second)
    return first, second


@triton.jit(do_not_specialize=["rows"])  # or one row, or 16, would run other code than 15
def _linear(
    x, weight, bias, narrow, outer, residual, out, rows, inputs, outputs, gate_stride, outer_gate_stride, rank,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RANK: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum over k of x[m, k] * weight[n, k], with what ``OperatorKernels.linear`` adds to it."""
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    row, column = m[:, None].to(tl.int64), n[None, :].to(tl.int64)
    has_row, has_column = m[:, None] < rows, n[None, :] < outputs
    first = tl.zeros((TILE_M, TILE_N), tl.float32)
    second = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(0, inputs, TILE_K):
        k = start + tl.arange(0, TILE_K)
        first, second = _add_products(
            first, second, x, weight, row, column, k, inputs, has_row, has_column, gate_stride, GATED
        )
    if RANK > 0:
        k = tl.arange(0, RANK)
        first, second = _add_products(
            first, second, narrow, outer, row, column, k, rank, has_row, has_column, outer_gate_stride, GATED
        )
    if BIAS:
        first += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
        if GATED:
            second += tl.load(bias + outputs + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    if GATED:
        # Rounded where separate operations would round.
        gate = _rounded(first, x.dtype.element_ty)
        first = _rounded(gate / (1.0 + tl.exp(-gate)), x.dtype.element_ty) * _rounded(second, x.dtype.element_ty)
    place = row * outputs + column
    if RESIDUAL:
        before = tl.load(residual + place, mask=has_row & has_column, other=0.0).to(tl.float32)
        first = before + _rounded(first, out.dtype.element_ty)
    tl.store(out + place, first.to(out.dtype.element_ty), mask=has_row & has_column)


@triton.jit
def _norm(x, weight, out, width, eps, WIDTH: tl.constexpr):
    """RMS norm of a row: rounded after scaling to unit size, and again after the weight."""
    at = tl.program_id(0).to(tl.int64) * width
    k = tl.arange(0, WIDTH)
    values = tl.load(x + at + k, mask=k < width, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
    unit = _rounded(values * scale, x.dtype.element_ty)
    scaled = unit * tl.load(weight + k, mask=k < width, other=0.0).to(tl.float32)
    tl.store(out + at + k, scaled.to(x.dtype.element_ty), mask=k < width)


@triton.jit(do_not_specialize=["stride"])
def _rope_store(
    qkv, q_norm, k_norm, cos, sin, positions, cache_rows, stride, keys, values, heads, kv_heads, dim, eps,
    NORMS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head of one row: a query is normed and rotated in place, a key on its way to the cache; a value just goes."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = dim // 2
    k = tl.arange(0, HALF)
    inside = k < half
    at = qkv + (row * (heads + 2 * kv_heads) + head) * dim
    kind = qkv.dtype.element_ty
    low, high = tl.load(at + k, mask=inside, other=0.0), tl.load(at + half + k, mask=inside, other=0.0)
    cache_row = tl.load(cache_rows + row * stride)
    stored = k < tl.where(cache_row >= 0, half, 0)
    if head >= heads + kv_heads:
        to = values + (cache_row * kv_heads + head - heads - kv_heads) * dim
        tl.store(to + k, low, mask=stored)
        tl.store(to + half + k, high, mask=stored)
    else:
        first, second = low.to(tl.float32), high.to(tl.float32)
        if NORMS:
            squares = tl.sum(first * first, 0) + tl.sum(second * second, 0)
            scale = 1.0 / tl.sqrt(squares / dim + eps)
            norm = q_norm
            if head >= heads:
                norm = k_norm
            w = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(norm + half + k, mask=inside, other=0.0).to(tl.float32)
            first = _rounded(_rounded(first * scale, kind) * w, kind)
            second = _rounded(_rounded(second * scale, kind) * v, kind)
        position = tl.load(positions + row * stride)
        c = tl.load(cos + position * half + k, mask=inside, other=0.0)
        s = tl.load(sin + position * half + k, mask=inside, other=0.0)
        turned = (_rounded(first * c, kind) - _rounded(second * s, kind)).to(kind)
        turned_high = (_rounded(second * c, kind) + _rounded(first * s, kind)).to(kind)
        if head < heads:
            tl.store(at + k, turned, mask=inside)
            tl.store(at + half + k, turned_high, mask=inside)
        else:
            to = keys + (cache_row * kv_heads + head - heads) * dim
            tl.store(to + k, turned, mask=stored)
            tl.store(to + half + k, turned_high, mask=stored)


@triton.jit(do_not_specialize=["stride"])
def _attention(
    qkv, keys, values, out, slots, prefixes, path_lengths, paths, stride, slot_size, heads, kv_heads, dim, scale,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's queries of one KV head, over its prefix, its ancestors and itself, in position order."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, prefix = tl.load(slots + row * stride), tl.load(prefixes + row * stride)
    count = prefix + tl.load(path_lengths + row * stride)
    query, d = tl.arange(0, QUERIES)[:, None], tl.arange(0, DIM)[None, :]
    own = (query < GROUP) & (d < dim)
    head = kv_head * GROUP + query
    q = tl.load(qkv + (row * (heads + 2 * kv_heads) + head) * dim + d, mask=own, other=0.0)
    best = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, DIM), tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        seen, behind = place < count, place - prefix
        ancestor = tl.load(paths + row * stride + behind, mask=seen & (behind >= 0), other=0)
        position = tl.where(behind < 0, place, prefix + ancestor)
        at = ((slot * slot_size + position) * kv_heads + kv_head)[:, None] * dim + d
        there = seen[:, None] & (d < dim)
        k = tl.load(keys + at, mask=there, other=0.0)
        scores = _dot(q, tl.trans(k), tl.zeros((QUERIES, BLOCK), tl.float32)) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        top = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - top[:, None])
        fade = tl.exp(best - top)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(values + at, mask=there, other=0.0)
        result = _dot(weights.to(v.dtype), v, result * fade[:, None])
        best = top
    result = result / tl.where(total > 0.0, total, 1.0)[:, None]  # rows that fill a step up see nothing
    tl.store(out + (row * heads + head) * dim + d, result.to(out.dtype.element_ty), mask=own)


class TritonKernels(OperatorKernels):
    """``Kernels`` for fp32 and bf16, in the interpreter or on a GPU.

    That is the only one this process sees (Ray gives each rank its own), or number ``rank`` of several.
    Raises ``KernelsUnavailable`` where there is none that can, or for another dtype.
    """

    def __init__(self, dtype: torch.dtype, rank: int = 0) -> None:
        if dtype not in TILE_ROWS:
            raise KernelsUnavailable(f"they compute in {', '.join(map(str, TILE_ROWS))}, not {dtype}")
        super().__init__("triton", dtype, torch.device("cpu") if INTERPRETED else _gpu(rank))
        if not INTERPRETED:
            check_launcher()

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, wide: bool = False) -> PackedLinear:
        kept = None if bias is None else self.place(bias)
        return PackedLinear(self.place(weight.to(self.dtype)), kept, weight.shape[0], wide=wide)

    def pack_gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> PackedLinear:
        biases = None if gate_bias is None or up_bias is None else self.place(torch.stack([gate_bias, up_bias]))
        weight = self.place(torch.stack([gate, up]).to(self.dtype))
        return PackedLinear(weight, biases, gate.shape[0], gated=True)

    def forward_of(self, model: PackedModel) -> Forward:
        return _TritonForward(self, model)

    def on_device(self, step: StepRows) -> StepRows:
        rows = _DeviceRows(len(step), step.paths.shape[1], self.device)
        rows.fill(step)
        return rows.step

    def linear(self, x: torch.Tensor, packed: PackedLinear, residual: torch.Tensor | None = None) -> torch.Tensor:
        x, (count, inputs), outputs = x.contiguous(), x.shape, packed.outputs
        kind = torch.float32 if packed.wide else self.dtype
        out = torch.empty((count, outputs), dtype=kind, device=self.device)
        weight, adapter = packed.weight, packed.adapter
        narrow = x if adapter is None else self.linear(x, adapter.inner)
        outer = weight if adapter is None else adapter.outer.weight
        rank = 0 if adapter is None else adapter.inner.outputs
        tile = TILE_OUTPUTS if outputs < WIDE_OUTPUTS else WIDE_TILE_OUTPUTS
        grid = (triton.cdiv(count, TILE_ROWS[self.dtype]), triton.cdiv(outputs, tile))
        _linear[grid](
            x, weight, weight if packed.bias is None else packed.bias, narrow, outer,
            out if residual is None else residual, out, count, inputs, outputs, weight.stride(0), outer.stride(0), rank,
            GATED=packed.gated, BIAS=packed.bias is not None, RESIDUAL=residual is not None,
            RANK=max(LEAST_TILE, triton.next_power_of_2(rank)) if rank else 0,
            TILE_M=TILE_ROWS[self.dtype], TILE_N=tile, TILE_K=TILE_INPUTS[self.dtype],
        )  # fmt: skip
        return out

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        count, width = x.shape
        _norm[(count,)](x, weight, out, width, eps, WIDTH=triton.next_power_of_2(width))
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
        q_norm, k_norm = norms or (qkv, qkv)
        _rope_store[(len(step), heads.num + 2 * heads.num_kv)](
            qkv, q_norm, k_norm, heads.cos, heads.sin, step.positions, step.cache_rows, step.positions.stride(0),
            keys, values, heads.num, heads.num_kv, heads.dim, heads.eps,
            NORMS=norms is not None, HALF=triton.next_power_of_2(heads.dim // 2),
        )  # fmt: skip

    def attention(
        self, qkv: torch.Tensor, heads: Heads, step: StepRows, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty((len(step), heads.num * heads.dim), dtype=self.dtype, device=self.device)
        group = heads.num // heads.num_kv
        _attention[(len(step), heads.num_kv)](
            qkv, keys, values, out, step.slots, step.prefixes, step.path_lengths, step.paths, step.slots.stride(0),
            keys.shape[1], heads.num, heads.num_kv, heads.dim, heads.dim**-0.5,
            GROUP=group, QUERIES=max(LEAST_TILE, triton.next_power_of_2(group)),
            DIM=max(LEAST_TILE, triton.next_power_of_2(heads.dim)), BLOCK=KEY_BLOCK,
        )  # fmt: skip
        return out


def _gpu(rank: int) -> torch.device:
    """The GPU of a rank, made the calling thread's own: ranks that follow have one thread, rank 0's have the first."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 or 1 < count <= rank:
        raise KernelsUnavailable(f"torch sees {count} GPUs, this is rank {rank}")
    device = torch.device("cuda", rank if count > 1 else 0)
    if (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        raise KernelsUnavailable(f"compute capability {capability}; allowed: {LEAST_CAPABILITY} and above")
    torch.cuda.set_device(device)
    return device


def check_launcher() -> None:
    """Triton compiles a C file before its first launch: better now than behind loaded weights."""
    try:
        _ = triton.runtime.driver.active.utils
    except Exception as error:
        raise KernelsUnavailable(
            f"Triton cannot launch kernels, which takes gcc and Python's headers: {error}"
        ) from error


class _DeviceRows:
    """Rows of a step on the device, at addresses that stay: ``size`` of them, with paths of up to ``width``."""

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        self._host = torch.zeros((size, COLUMNS + width), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._table = torch.zeros_like(self._host, device=device)
        tokens, slots, prefixes, positions, cache_rows, lengths = self._table[:, :COLUMNS].unbind(1)
        self.step = StepRows(tokens, slots, prefixes, positions, cache_rows, self._table[:, COLUMNS:], lengths, None)

    def fill(self, step: StepRows) -> None:
        """``step``'s rows; those behind them see nothing and write nothing."""
        count, width = step.paths.shape
        columns = (step.tokens, step.slots, step.prefixes, step.positions, step.cache_rows, step.path_lengths)
        for index, column in enumerate(columns):
            self._host[:count, index] = column
        self._host[:count, COLUMNS : COLUMNS + width] = step.paths
        self._host[count:] = 0
        self._host[count:, CACHE_ROW] = -1
        self._table.copy_(self._host)


class _TritonForward:
    """A whole step: its rows padded to a size of ``SIZES``, the layers as a CUDA graph once the size is known."""

    def __init__(self, kernels: TritonKernels, model: PackedModel) -> None:
        self._kernels, self._model = kernels, model
        self._rows: dict[tuple[int, int], _DeviceRows] = {}
        self._seen: Counter[Any] = Counter()
        self._graphs: OrderedDict[Any, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = OrderedDict()
        # One pool for all: what a graph leaves in it is read before the next one runs.
        self._pool = None if INTERPRETED else torch.cuda.graph_pool_handle()

    def __call__(
        self, step: StepRows, kv: KVStore, skip: frozenset[int], features: torch.Tensor | None
    ) -> torch.Tensor:
        count = len(step)
        size = next((size for size in SIZES if size >= count), -(-count // SIZES[-1]) * SIZES[-1])
        shape = size, max(kv.scratch, step.paths.shape[1])
        if shape not in self._rows:
            self._rows[shape] = _DeviceRows(*shape, self._kernels.device)
        rows = self._rows[shape]
        rows.fill(step)
        hidden = self._layers(
            (shape, kv.keys[0].data_ptr(), skip), lambda: self._kernels.layers(self._model, rows.step, kv, skip)
        )
        # Without logits, too, the step is waited for: the next one's time would hold this one's.
        return to_host(self._kernels.logits(self._model, hidden[:count], step.wanted, features))

    def _layers(self, key: Any, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``key``: of what ``compute`` launches: padded shape, cache, skipped sub-layers."""
        if key not in self._graphs:
            self._seen[key] += 1
            enough = SKIP_GRAPH_AFTER if key[-1] else GRAPH_AFTER
            if INTERPRETED or self._seen[key] <= enough:
                return compute()
            del self._seen[key]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                hidden = compute()
            self._graphs[key] = graph, hidden
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph, hidden = self._graphs[key]
        graph.replay()
        return hidden

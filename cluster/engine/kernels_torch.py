"""The torch form of the kernels: any dtype, no compiler. Row-invariant because every library call has one fixed shape.

Libraries choose a reduction order by shape, and round the last few elements of an array by another code path than the
rest. So rows go through in tiles of ``TILE`` (the last one padded), widths are padded to ``WIDTH``, keys come in blocks
of ``BLOCK``, and exponentials in chunks of ``CHUNK``. It is slow for few rows; the native form is the fast one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from cluster.engine.kernels_ops import OperatorKernels
from cluster.engine.packed import Heads, PackedLinear
from cluster.engine.rows import StepRows

TILE, WIDTH, BLOCK, CHUNK = 8, 64, 64, 4096


def _tiled(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply to (TILE, width) tiles of x: (n, width), the last one padded with zeros."""
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -rows % TILE))
    return torch.cat([function(tile.clone()) for tile in torch.split(padded, TILE)])[:rows]


def _exp(x: torch.Tensor) -> torch.Tensor:
    """exp in fixed chunks: the library's vector loop and its remainder loop do not always agree in the last bit."""
    flat = F.pad(x.flatten(), (0, -x.numel() % CHUNK))
    return torch.cat([torch.exp(chunk.clone()) for chunk in torch.split(flat, CHUNK)])[: x.numel()].view(x.shape)


def _pad_width(weight: torch.Tensor) -> torch.Tensor:
    return F.pad(weight, (0, -weight.shape[1] % WIDTH, 0, -weight.shape[0] % WIDTH))


class TorchKernels(OperatorKernels):
    """``Kernels`` in ordinary torch operations. Sums of bf16 values are fp32; fp64 stays fp64 throughout."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__("torch", dtype, torch.device("cpu"))
        self._sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, wide: bool = False) -> PackedLinear:
        # A bf16 product would be rounded to bf16 on its way out, so the head computes in fp32 from the start.
        dtype = self._sum_dtype if wide else self.dtype
        padded = _pad_width(weight.to(dtype)).contiguous()
        return PackedLinear(padded, None if bias is None else bias.to(dtype), weight.shape[0], wide=wide)

    def pack_gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> PackedLinear:
        weight = torch.stack([_pad_width(gate.to(self.dtype)), _pad_width(up.to(self.dtype))])
        bias = None
        if gate_bias is not None and up_bias is not None:
            bias = torch.stack([gate_bias, up_bias]).to(self.dtype)
        return PackedLinear(weight, bias, gate.shape[0], gated=True)

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, outputs: int) -> torch.Tensor:
        x = F.pad(x.to(weight.dtype), (0, weight.shape[1] - x.shape[1]))
        product = _tiled(lambda tile: F.linear(tile, weight), x)[:, :outputs]
        return product if bias is None else product + bias

    def linear(self, x: torch.Tensor, packed: PackedLinear, residual: torch.Tensor | None = None) -> torch.Tensor:
        if packed.gated:
            biases = (None, None) if packed.bias is None else (packed.bias[0], packed.bias[1])
            gate, up = (self._multiply(x, weight, bias, packed.outputs) for weight, bias in zip(packed.weight, biases))
            if packed.adapter is not None:
                narrow = self.linear(x, packed.adapter.inner)
                parts = packed.adapter.outer.weight
                gate, up = (
                    y + self._multiply(narrow, part, None, packed.outputs) for y, part in zip((gate, up), parts)
                )
            wide = gate.to(self._sum_dtype)
            result = (wide / (1 + _exp(-wide))).to(self.dtype) * up
        else:
            result = self._multiply(x, packed.weight, packed.bias, packed.outputs)
            if packed.adapter is not None:
                result = result + self.linear(self.linear(x, packed.adapter.inner), packed.adapter.outer)
        return (result if residual is None else residual + result).contiguous()

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(self._sum_dtype)
        mean = _tiled(lambda tile: tile.pow(2).mean(-1, keepdim=True), wide)
        return (wide * (1 / torch.sqrt(mean + eps))).to(self.dtype) * weight

    def rope_store(
        self,
        qkv: torch.Tensor,
        heads: Heads,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        step: StepRows,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        rows = qkv.view(len(step), heads.num + 2 * heads.num_kv, heads.dim)
        parts = list(torch.split(rows, [heads.num, heads.num_kv, heads.num_kv], 1))
        positions = step.positions.long()
        cos = heads.cos[positions].to(self.dtype)[:, None].repeat(1, 1, 2)
        sin = heads.sin[positions].to(self.dtype)[:, None].repeat(1, 1, 2)
        for index in range(2):
            part = parts[index]
            if norms is not None:
                flat = part.reshape(-1, heads.dim)
                part = self.norm(flat, norms[index], heads.eps).view(part.shape)
            low, high = part.chunk(2, -1)
            parts[index] = part * cos + torch.cat((-high, low), -1) * sin
        rows[:, : heads.num] = parts[0]
        keys.view(-1, heads.num_kv, heads.dim)[step.cache_rows] = parts[1]
        values.view(-1, heads.num_kv, heads.dim)[step.cache_rows] = parts[2]

    def attention(
        self, qkv: torch.Tensor, heads: Heads, step: StepRows, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        queries = qkv.view(len(step), -1, heads.dim)[:, : heads.num].to(self._sum_dtype)
        where, counts = _key_rows(step, keys.shape[1])
        flat_keys = keys.view(-1, heads.num_kv, heads.dim)
        flat_values = values.view(-1, heads.num_kv, heads.dim)
        results = []
        for start in range(0, len(step), TILE):
            tile = slice(start, min(start + TILE, len(step)))
            missing = TILE - (tile.stop - tile.start)
            q = F.pad(queries[tile], (0, 0, 0, 0, 0, missing)).view(TILE * heads.num_kv, -1, heads.dim)
            count = F.pad(counts[tile], (0, missing), value=1)
            used = -(-int(count.max()) // BLOCK) * BLOCK
            index = F.pad(where[tile, :used], (0, 0, 0, missing))
            k, v = (flat[index].to(self._sum_dtype).transpose(1, 2) for flat in (flat_keys, flat_values))
            mask = torch.arange(used) < count[:, None]
            out = self._attend(q * heads.dim**-0.5, k.flatten(0, 1), v.flatten(0, 1), mask)
            results.append(out.view(TILE, -1)[: TILE - missing])
        return torch.cat(results).to(self.dtype)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """q: (TILE * kv_heads, group, dim); k, v: (TILE * kv_heads, keys, dim); mask: (TILE, keys). As q.

        Blocks are added up one after the other; a block that is padding for a row adds exact zeros.
        """
        visible = mask.repeat_interleave(q.shape[0] // TILE, 0)[:, None]
        scores = [torch.bmm(q, block.transpose(1, 2).contiguous()) for block in torch.split(k, BLOCK, 1)]
        hidden = torch.cat(scores, 2).masked_fill(~visible, float("-inf"))
        weights = _exp(hidden - hidden.amax(-1, keepdim=True)).masked_fill(~visible, 0.0)
        total = torch.zeros(*q.shape[:2], 1, dtype=q.dtype)
        result = torch.zeros_like(q)
        for part, block in zip(torch.split(weights, BLOCK, 2), torch.split(v, BLOCK, 1)):
            part = part.contiguous()
            total = total + part.sum(-1, keepdim=True)
            result = result + torch.bmm(part, block.contiguous())
        return result / total


def _key_rows(step: StepRows, slot_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's keys lie, in position order: (n, keys padded to BLOCK) cache rows, and (n,) how many count."""
    counts = (step.prefixes + step.path_lengths).long()
    width = -(-int(counts.max()) // BLOCK) * BLOCK
    place = torch.arange(width).expand(len(step), width)
    prefix = step.prefixes.long()[:, None]
    behind = (place - prefix).clamp(0, step.paths.shape[1] - 1)
    position = torch.where(place < prefix, place, prefix + step.paths.long().gather(1, behind))
    return step.slots.long()[:, None] * slot_size + position, counts

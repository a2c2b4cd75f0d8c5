"""Memory on huge pages: a step walks through all weights and keys, more than 4 KiB page tables keep at hand."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

ARENA_BYTES = 128 << 20


def zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros on huge pages where the system has them. Memory is taken when a page is first touched."""
    count = torch.Size(shape).numel()
    # Private: a shared mapping, Python's default, is not given huge pages on most systems.
    region = mmap.mmap(-1, max(count, 1) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=dtype)[:count].view(shape)


class Arena:
    """Room for many weights, one behind the other."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def place(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of ``weight`` at a 64-byte boundary."""
        size = weight.numel() * weight.element_size()
        padded = (size + 63) // 64 * 64
        if padded > self._free.numel():
            self._free = zeros((max(ARENA_BYTES, padded),), torch.uint8)
        room, self._free = self._free[:size], self._free[padded:]
        placed = room.view(weight.dtype).view(weight.shape)
        placed.copy_(weight)
        return placed

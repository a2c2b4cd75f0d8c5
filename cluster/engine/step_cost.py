"""Measures what a step costs on this machine, by number of rows: the governor's cost curve."""

from __future__ import annotations

import math
import time
from itertools import accumulate

import numpy as np

from cluster.engine.kv_cache import SlotRows
from cluster.engine.rank import Rank

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 64  # committed positions behind which the rows are measured
REPEATS = 4


def measure_steps(rank: Rank, max_rows: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Least seconds of a step at each width up to ``max_rows``; never falling with width.

    Uses one free KV slot and gives it back. Takes about 30 steps, the widths in turn: what else the machine did for a
    moment must not become the price of one width for as long as the engine lives.
    """
    slot = rank.kv.allocate()
    try:
        context = min(CONTEXT, rank.kv.capacity // 2)
        rank.forward([_chain(slot, context, logits=False)])
        rank.kv.commit(slot, range(context))
        widths = (*(width for width in WIDTHS if width < max_rows), max_rows)
        least = dict.fromkeys(widths, math.inf)
        for _ in range(REPEATS):
            for width in widths:
                start = time.perf_counter()
                rank.forward([_chain(slot, min(width, rank.kv.scratch))])
                least[width] = min(least[width], time.perf_counter() - start)
        seconds = accumulate(least.values(), max)
        return widths, tuple(seconds)
    finally:
        rank.kv.free(slot)


def _chain(slot: int, count: int, logits: bool = True) -> SlotRows:
    return SlotRows(slot, np.zeros(count, np.int32), np.arange(-1, count - 1, dtype=np.int32), logits=logits)

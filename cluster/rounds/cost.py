"""The cost curve as service shows it: corrected by every step's own time, without following the machine's moods."""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate, zip_longest

from cluster.engine.step_cost import CostCurve

COMMON_RATE = 0.2  # how fast "the whole machine is slower now" is followed
SHAPE_RATE = 0.01  # how fast one width's price relative to the others is
CLIP = 0.5  # log of how far a single step may pull: a step that was interrupted says little
MAX_SHAPE = math.log(4.0)
OVERHEAD_RATE = 0.05
OVERHEAD_CLIP_S = 1e-3  # beyond twice what is usual outside a pass, a round was interrupted there
MIN_SEEN = 50  # steps at a width before its correction counts as knowledge


class LiveCost:
    """``CostCurve`` times what steps showed since: a factor common to all widths, and one for each width.

    Decisions depend on the shape alone. Other load on the machine slows all widths alike and passes, so nearly all of a
    deviation is ascribed to the common factor; what remains when widths alternate is the shape's.
    """

    def __init__(self, curve: CostCurve) -> None:
        self.curve = curve
        self.overhead = 0.0
        self._common = 1.0
        self._shape = [0.0] * len(curve.rows)  # of each width, the log
        self._factors = [1.0] * len(curve.rows)
        self._seen = [0.0] * len(curve.rows)
        self._tabled: tuple[float | None, list[float]] | None = None

    def at(self, rows: int, context: float | None = None, sessions: int = 1) -> float:
        """Seconds of a pass of ``rows`` rows of so many sessions, each behind ``context`` committed positions."""
        table = self._table(context)
        low, high, share = self._between(rows)
        one = table[low] + share * (table[high] - table[low])
        return self._common * (one + self.curve.other_sessions(context, sessions))

    def rounds(self, first: int, count: int, context: float | None = None, sessions: int = 1) -> list[float]:
        """Seconds of ``count`` rounds with ``first``, ``first + 1``, ... rows, without drafting; never falling."""
        return [self.at(rows, context, sessions) + self.overhead for rows in range(first, first + count)]

    def observe(self, rows: int, context: float, forward_s: float, other_s: float, sessions: int = 1) -> None:
        """A step of ``rows`` rows took ``forward_s`` in the forward pass and ``other_s`` outside it and drafting."""
        other_s = min(other_s, 2.0 * self.overhead + OVERHEAD_CLIP_S)
        self.overhead += OVERHEAD_RATE * (other_s - self.overhead)
        if forward_s <= 0.0:
            return
        error = max(-CLIP, min(CLIP, math.log(forward_s / self.at(rows, context, sessions))))
        self._common *= math.exp(COMMON_RATE * error)
        low, high, share = self._between(rows)
        for width, weight in ((low, 1.0 - share), (high, share)):
            self._seen[width] += weight
            moved = self._shape[width] + SHAPE_RATE * weight * error
            self._shape[width] = max(-MAX_SHAPE, min(MAX_SHAPE, moved))
            self._factors[width] = math.exp(self._shape[width])
        self._tabled = None

    @property
    def drift(self) -> float:
        """By which factor the prices of two well-known widths have moved against each other since start."""
        known = [shape for shape, seen in zip(self._shape, self._seen) if seen >= MIN_SEEN]
        return math.exp(max(known) - min(known)) if known else 1.0

    def _table(self, context: float | None) -> list[float]:
        """Seconds at the curve's widths, but for the common factor. Kept: a round asks for the same one many times."""
        if self._tabled is None or self._tabled[0] != context:
            curve = self.curve
            slopes = curve.slopes if context is not None else ()
            behind = (context or 0.0) - curve.context
            rows = zip_longest(curve.seconds, slopes, self._factors, fillvalue=0.0)
            self._tabled = context, list(accumulate(((s + behind * slope) * f for s, slope, f in rows), max))
        return self._tabled[1]

    def _between(self, rows: int) -> tuple[int, int, float]:
        """The widths around ``rows``, and how far from the first to the second it lies."""
        widths = self.curve.rows
        high = min(max(bisect_left(widths, rows), 1), len(widths) - 1)
        low = high - 1
        share = (rows - widths[low]) / (widths[high] - widths[low])
        return low, high, max(0.0, min(1.0, share))

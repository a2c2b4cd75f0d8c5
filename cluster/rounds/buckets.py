"""A histogram that is being filled: one look-up and two additions an observation."""

from __future__ import annotations

import bisect

from cluster.core.stats import Histogram


class Buckets:
    """``bounds``: ascending upper bounds, the last bucket takes the rest."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._total)

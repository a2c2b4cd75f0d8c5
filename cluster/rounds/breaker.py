"""Circuit breakers: a draft worker that keeps a target waiting is left out until a probe of it succeeds."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

MISSES_TO_OPEN = 2  # a worker that misses this many deadlines in a row is left out
PROBE_INTERVAL_S = 1.0  # a worker that is left out is asked again this often, without anyone waiting for it
FORGET_AFTER_S = 60.0  # a worker that nobody had to do with for so long is a stranger again


@dataclass(slots=True)
class _Trouble:
    """Deadlines missed in a row; when the worker last missed one or was probed, and whether it was the latter."""

    misses: int
    since_s: float
    probing: bool = False


class Breakers:
    """The workers of one stage, each with a breaker of its own. Only those in trouble are remembered.

    Times are of any one clock. ``openings``: how often a breaker opened.
    """

    def __init__(self) -> None:
        self.openings = 0
        self._troubled: dict[Hashable, _Trouble] = {}

    @property
    def num_open(self) -> int:
        return sum(trouble.misses >= MISSES_TO_OPEN for trouble in self._troubled.values())

    def is_open(self, worker: Hashable) -> bool:
        trouble = self._troubled.get(worker)
        return trouble is not None and trouble.misses >= MISSES_TO_OPEN

    def missed(self, worker: Hashable, now: float) -> bool:
        """A deadline passed without the worker's answer, or a call to it failed. True where that opens its breaker."""
        self.forget(now)
        trouble = self._troubled.setdefault(worker, _Trouble(0, now))
        trouble.misses, trouble.since_s, trouble.probing = trouble.misses + 1, now, False
        opened = trouble.misses == MISSES_TO_OPEN
        self.openings += opened
        return opened

    def in_time(self, worker: Hashable) -> None:
        """An answer came in time. Only a probe closes an open breaker."""
        if not self.is_open(worker):
            self._troubled.pop(worker, None)

    def due_s(self, worker: Hashable) -> float:
        """When an open breaker's worker may be probed."""
        return self._troubled[worker].since_s + PROBE_INTERVAL_S

    def probed(self, worker: Hashable, now: float) -> None:
        trouble = self._troubled[worker]
        trouble.since_s, trouble.probing = now, True

    def probe_answered(self, worker: Hashable, now: float, patience_s: float) -> bool:
        """True where that closes an open breaker: the probe took no longer than a round would have waited.

        An answer to what was asked before the breaker opened is none.
        """
        trouble = self._troubled.get(worker)
        closes = trouble is not None and trouble.probing and now - trouble.since_s <= patience_s
        if closes:
            del self._troubled[worker]
        return closes

    def forget(self, now: float) -> None:
        """Whoever has been in trouble, and neither asked nor probed, for ``FORGET_AFTER_S``: it may long be gone."""
        gone = [worker for worker, trouble in self._troubled.items() if now - trouble.since_s > FORGET_AFTER_S]
        for worker in gone:
            del self._troubled[worker]

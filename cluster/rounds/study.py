"""Time for a drafter that learns while it serves: what is idle, and a small share of what is busy.

Steps are taken between rounds only, when no session's guesses are in the making.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from drafters.base import Drafter, Learner

log = logging.getLogger(__name__)

SHARE = 0.02  # of busy time, at most
MOST_SAVED_S = 0.5  # of it that is kept for later, where there is nothing to learn for long


class StudyTime:
    """The hours of one drafter. Engine thread only."""

    def __init__(
        self, drafter: Drafter | None, share: float = SHARE, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.share = share
        self.busy_s = 0.0
        self.spent_s = 0.0
        self._learner: Learner | None = drafter if isinstance(drafter, Learner) else None
        self._clock = clock
        self._saved_s = 0.0
        self._step_s = 0.0

    def earn(self, seconds: float) -> None:
        """A round took so long."""
        self.busy_s += seconds
        self._saved_s = min(self._saved_s + self.share * seconds, max(MOST_SAVED_S, self._step_s))

    def step(self, idle: bool) -> bool:
        """One step where it is time. False where there is nothing to learn, or no time for it.

        Among rounds a step must have been earned, as long as it took the last time; what it takes longer is made up
        for. Who comes while it is idle waits for one step at most.
        """
        if self._learner is None or (not idle and (self._saved_s <= 0.0 or self._saved_s < self._step_s)):
            return False
        start = self._clock()
        try:
            learned = self._learner.study()
        except Exception:
            log.exception("a drafter that learns failed; it goes on as it is")
            self._learner, learned = None, False
        took = self._clock() - start
        if learned:
            self._step_s = took
        if not idle:
            self.spent_s += took
            self._saved_s -= took
        return learned

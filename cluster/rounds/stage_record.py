"""What a target knows of one remote stage: whether it is in use, and what came of its trees."""

from __future__ import annotations

import logging
import math

from cluster.core.types import StageStats
from cluster.rounds.buckets import Buckets

log = logging.getLogger(__name__)

MISSES_TO_OPEN = 2  # a stage that misses this many deadlines in a row is left out
AGE_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class StageRecord:
    """Circuit breaker and counts of one stage. Guarded by the pipeline's lock.

    The breaker opens after consecutive misses; a probe answered in time closes it. Nodes wasted are counted by who
    guessed them, which need not be who sent them.
    """

    def __init__(self, stage: str) -> None:
        self.misses = 0  # rounds that went on without the stage's tree, and calls that failed
        self.late = 0  # trees that came when their round had begun without them
        self.refused = 0  # trees that broke the rules, or hang on a state that their session never was in
        self.wasted = 0  # its guesses that no step verified
        self.last_probe = -math.inf
        self._stage = stage
        self._misses_in_a_row = 0
        self._openings = 0
        self._answers = 0
        self._busy_s = 0.0
        self._age = Buckets(AGE_S)

    @property
    def open(self) -> bool:
        return self._misses_in_a_row >= MISSES_TO_OPEN

    def missed(self, now: float) -> None:
        self.misses += 1
        self._misses_in_a_row += 1
        if self._misses_in_a_row == MISSES_TO_OPEN:
            self.last_probe = now
            self._openings += 1
            log.warning("stage %s missed %d deadlines: left out until a probe succeeds", self._stage, MISSES_TO_OPEN)

    def in_time(self) -> None:
        """A tree came in time. Only a probe closes an open breaker."""
        if not self.open:
            self._misses_in_a_row = 0

    def answered(self, seconds: float) -> None:
        """A call came back whose worker computed for ``seconds``, by what it says."""
        self._answers += 1
        self._busy_s += seconds if 0.0 < seconds < math.inf else 0.0

    def answered_probe(self, now: float, patience_s: float) -> None:
        """Closes an open breaker where the probe took no longer than a round would have waited."""
        if self.open and now - self.last_probe <= patience_s:
            self._misses_in_a_row = 0
            log.info("stage %s answered a probe: it is asked again", self._stage)

    def used(self, age_s: float) -> None:
        """A round takes a tree that arrived ``age_s`` ago."""
        self._age.observe(age_s)

    def snapshot(self) -> StageStats:
        return StageStats(
            breaker_open=self.open,
            breaker_openings=self._openings,
            answers=self._answers,
            busy_s=self._busy_s,
            late_trees=self.late,
            refused_trees=self.refused,
            wasted_nodes=self.wasted,
            draft_age=self._age.snapshot(),
        )

"""What a target knows of one remote stage: which of its workers are in use, and what came of its trees."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable

from cluster.core.stats import StageStats
from cluster.rounds.breaker import MISSES_TO_OPEN, Breakers
from cluster.rounds.buckets import Buckets

log = logging.getLogger(__name__)

AGE_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class StageRecord:
    """Circuit breakers and counts of one stage. Guarded by the pipeline's lock.

    Nodes wasted are counted by who guessed them, which need not be who sent them.
    """

    def __init__(self, stage: str) -> None:
        self.misses = 0  # rounds that went on without the stage's tree, and calls that failed
        self.late = 0  # trees that came when their round had begun without them
        self.refused = 0  # trees that broke the rules, or hang on a state that their session never was in
        self.wasted = 0  # its guesses that no step verified
        self.breakers = Breakers()
        self._stage = stage
        self._answers = 0
        self._busy_s = 0.0
        self._age = Buckets(AGE_S)

    def missed(self, worker: Hashable, now: float) -> None:
        """A round went on without the stage's tree, or a call failed. ``worker``: whose fault it is, if anyone's."""
        self.misses += 1
        if worker is not None and self.breakers.missed(worker, now):
            log.warning(
                "a worker of stage %s missed %d deadlines: left out until a probe succeeds", self._stage, MISSES_TO_OPEN
            )

    def answered(self, seconds: float) -> None:
        """A call came back whose worker computed for ``seconds``, by what it says."""
        self._answers += 1
        self._busy_s += seconds if 0.0 < seconds < math.inf else 0.0

    def answered_probe(self, worker: Hashable, now: float, patience_s: float) -> None:
        if self.breakers.probe_answered(worker, now, patience_s):
            log.info("a worker of stage %s answered a probe: it is asked again", self._stage)

    def used(self, age_s: float) -> None:
        """A round takes a tree that arrived ``age_s`` ago."""
        self._age.observe(age_s)

    def snapshot(self) -> StageStats:
        return StageStats(
            breakers_open=self.breakers.num_open,
            breaker_openings=self.breakers.openings,
            answers=self._answers,
            busy_s=self._busy_s,
            late_trees=self.late,
            refused_trees=self.refused,
            wasted_nodes=self.wasted,
            draft_age=self._age.snapshot(),
        )

"""How much to guess: pure choices from measured facts. A wrong choice here costs time, never correctness.

Design §5: at every possible size N the value of a step is (sessions + expected accepted nodes) per second of (waiting
for drafts + the step itself); guessing nothing competes as an equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cluster.core.token_tree import TokenTree

SCORE_BINS = 10
PRIOR_TRIALS = 8.0  # weight of "the drafter's own estimate is right" against what was observed
PROBE_EVERY = 48  # rounds between two looks at the drafting mode not in use


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Seconds of a step by number of rows; ``rows`` ascending, measured at start-up on this machine."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: int) -> float:
        return float(np.interp(rows, self.rows, self.seconds))

    @property
    def plain_step(self) -> float:
        """Seconds of a plain decoding step of one session."""
        return self.at(1)


@dataclass(slots=True)
class Calibration:
    """Measured acceptance of a node given its parent was accepted, by stage and by the drafter's own estimate."""

    trials: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, SCORE_BINS)))
    hits: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, SCORE_BINS)))

    def observe(self, tree: TokenTree, accepted: Sequence[int]) -> None:
        """Count every node whose parent lies on the accepted path (the root included)."""
        on_path = np.zeros(len(tree) + 1, np.bool_)
        on_path[-1] = True  # the root, addressed by parent -1
        on_path[list(accepted)] = True
        tested = on_path[tree.parents]
        bins = _bins(_conditional(tree))
        np.add.at(self.trials, (tree.stages[tested], bins[tested]), 1.0)
        np.add.at(self.hits, (tree.stages[tested], bins[tested]), on_path[:-1][tested])
        if self.trials.sum() > 20_000:  # forget slowly, so that a change of topic shows
            self.trials *= 0.5
            self.hits *= 0.5

    def scores(self, tree: TokenTree) -> npt.NDArray[np.float64]:
        """(n,) calibrated path probabilities; never larger than the parent's."""
        conditional = _conditional(tree)
        bins = _bins(conditional)
        stages = tree.stages
        rate = (self.hits[stages, bins] + PRIOR_TRIALS * conditional) / (self.trials[stages, bins] + PRIOR_TRIALS)
        path = np.empty(len(tree))
        for node, parent in enumerate(tree.parents.tolist()):
            path[node] = rate[node] if parent < 0 else rate[node] * path[parent]
        return path


def choose_nodes(
    scores: Sequence[npt.NDArray[np.float64]], curve: CostCurve, max_nodes: int, base_rows: int, wait_s: float = 0.0
) -> list[int]:
    """How many of each session's best nodes to verify: one heap over all sessions.

    scores: per session, path probabilities in any order. base_rows: rows of the step without any node.
    Returns one count per session, at most ``max_nodes`` in all.
    """
    sessions = len(scores)
    flat = np.concatenate(scores) if scores else np.empty(0)
    if flat.size == 0 or max_nodes <= 0:
        return [0] * sessions
    owner = np.repeat(np.arange(sessions), [len(part) for part in scores])
    order = np.argsort(-flat, kind="stable")[:max_nodes]
    gains = sessions + np.concatenate(([0.0], np.cumsum(flat[order])))
    costs = wait_s + np.interp(base_rows + np.arange(len(order) + 1), curve.rows, curve.seconds)
    best = int(np.argmax(gains / costs))
    return [int(count) for count in np.bincount(owner[order[:best]], minlength=sessions)]


@dataclass(slots=True)
class ModeChooser:
    """Local guesses or remote stages: whichever yielded more tokens per second, looked at again now and then."""

    tokens: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rounds: int = 0

    def observe(self, mode: str, tokens: int, seconds: float) -> None:
        self.tokens[mode] = 0.95 * self.tokens.get(mode, 0.0) + tokens
        self.seconds[mode] = 0.95 * self.seconds.get(mode, 0.0) + seconds

    def choose(self, modes: Sequence[str]) -> str:
        """The best of ``modes`` (order breaks ties), or another that is due for a look."""
        self.rounds += 1
        unseen = [mode for mode in modes if mode not in self.seconds]
        if unseen:
            return unseen[0]
        best = max(modes, key=self.rate)
        look = (self.rounds % PROBE_EVERY) // 2  # two rounds each: the first only fills the caches
        others = [mode for mode in modes if mode != best]
        return others[look] if look < len(others) else best

    def rate(self, mode: str) -> float:
        """Tokens per second of late; 0 where the mode was never used."""
        return self.tokens.get(mode, 0.0) / self.seconds[mode] if self.seconds.get(mode) else 0.0


def _conditional(tree: TokenTree) -> npt.NDArray[np.float64]:
    """(n,) the drafter's estimate of each node given its parent."""
    scores = np.clip(tree.scores.astype(np.float64), 1e-6, 1.0)
    parents = np.concatenate((scores, [1.0]))[tree.parents]
    return np.minimum(scores / parents, 1.0)


def _bins(probability: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    return np.minimum((probability * SCORE_BINS).astype(np.int64), SCORE_BINS - 1)

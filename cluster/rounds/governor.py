"""How much to guess: pure choices from measured facts. A wrong choice here costs time, never correctness.

Design §5: at every possible size N the value of a step is (sessions + expected accepted nodes) per second of (waiting
for drafts + the step itself); guessing nothing competes as an equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cluster.core.token_tree import TokenTree

SCORE_BINS = 10
PRIOR_TRIALS = 8.0  # weight of "the drafter's own estimate is right" against what was observed
MAX_TRIALS = 400.0  # of one kind of node are remembered: a change of topic shows after some hundred rounds
FADING = 0.9995  # of all evidence is left after a round: what is no longer tried is tried again, now and then
PREFERENCE = 1.1  # another mode must be faster than the usual one by this factor
MIN_ROUNDS = 6  # measured rounds before a mode's speed counts
LOOK_GAP = 48  # rounds between two looks at modes not in use, at least
LOOK_ROUNDS = 4  # how long a look is; its first round only brings the drafters up to date
LOOK_COST = 0.01  # share of the time that looks may cost
RECENT = 0.998  # what counts as "the time" fades by this much a round


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

    def forget(self) -> None:
        """A round is over. Evidence fades even without new: what is never tried could never recover otherwise."""
        keep = FADING * np.minimum(1.0, MAX_TRIALS / np.maximum(self.trials, 1.0))
        self.trials *= keep
        self.hits *= keep

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
    scores: Sequence[npt.NDArray[np.float64]], curve: CostCurve, max_nodes: int, base_rows: int
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
    costs = np.interp(base_rows + np.arange(len(order) + 1), curve.rows, curve.seconds)
    best = int(np.argmax(gains / costs))
    return [int(count) for count in np.bincount(owner[order[:best]], minlength=sessions)]


@dataclass(slots=True)
class ModeChooser:
    """Where guesses come from: whichever way decodes fastest, the others looked at again as long as that is cheap.

    Speed is relative to plain decoding of as many sessions, so that modes compare although load changes.
    """

    tokens: dict[str, float] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    rounds: Counter[str] = field(default_factory=Counter)
    last: str = ""
    looking_at: str = ""
    look_left: int = 0
    rounds_since_look: int = 0
    num_looks: int = 0
    spent: float = 0.0
    lost: float = 0.0

    def observe(self, mode: str, tokens: float, steps: float) -> None:
        """A round in ``mode`` yielded ``tokens`` per session and took as long as ``steps`` plain steps."""
        fastest = max(self.steps, key=self.speed, default=mode)
        self.spent = RECENT * self.spent + steps
        self.lost *= RECENT
        if mode != fastest and self.speed(fastest) > 0.0:
            self.lost = max(0.0, self.lost + steps - tokens / self.speed(fastest))
        switched, self.last = mode != self.last, mode
        if not switched:
            self.tokens[mode] = 0.95 * self.tokens.get(mode, 0.0) + tokens
            self.rounds[mode] += 1
            self.steps[mode] = 0.95 * self.steps.get(mode, 0.0) + steps

    def choose(self, modes: Sequence[str]) -> str:
        """The best of ``modes``, or another that is due for a look."""
        best = self.best(modes)
        others = [mode for mode in modes if mode != best]
        if self.look_left and self.looking_at in modes:
            self.look_left -= 1
            return self.looking_at
        self.rounds_since_look += 1
        due = self.rounds_since_look >= LOOK_GAP and self.lost <= LOOK_COST * self.spent
        if not others or not due:
            return best
        self.looking_at = others[self.num_looks % len(others)]
        self.num_looks += 1
        self.look_left, self.rounds_since_look = LOOK_ROUNDS - 1, 0
        return self.looking_at

    def best(self, modes: Sequence[str]) -> str:
        """A mode hardly measured, else the fastest; the first one is the usual one, which others must clearly beat."""
        unseen = [mode for mode in modes if self.rounds[mode] < MIN_ROUNDS]
        if unseen:
            return unseen[0]
        return max(modes, key=lambda mode: self.speed(mode) * (PREFERENCE if mode == modes[0] else 1.0))

    def speed(self, mode: str) -> float:
        """Tokens per session and plain step of late; 0 where the mode was never measured."""
        return self.tokens.get(mode, 0.0) / self.steps[mode] if self.steps.get(mode) else 0.0


def _conditional(tree: TokenTree) -> npt.NDArray[np.float64]:
    """(n,) the drafter's estimate of each node given its parent."""
    scores = np.clip(tree.scores.astype(np.float64), 1e-6, 1.0)
    parents = np.concatenate((scores, [1.0]))[tree.parents]
    return np.minimum(scores / parents, 1.0)


def _bins(probability: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    return np.minimum((probability * SCORE_BINS).astype(np.int64), SCORE_BINS - 1)

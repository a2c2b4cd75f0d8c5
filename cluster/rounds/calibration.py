"""What a drafter's scores are worth: measured acceptance by stage and score, and by the session's present text.

Evidence is free: whatever the target emitted shows which guesses were right, also among those that were not verified.

Plain lists throughout: a round has few nodes, and a forward pass has just thrown everything out of the caches. What a
round costs here is how much code and data it touches, and an array library's call touches more than all of its nodes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin

SCORE_EDGES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 0.95)
BINS = len(SCORE_EDGES) + 1
PRIOR_TRIALS = 8.0  # weight of "the drafter's own estimate is right" against what was observed
MAX_TRIALS = 400.0  # of one kind of node are remembered: what changes for all sessions shows after some hundred rounds
MOOD_WEIGHT = 2.0  # hits that a session must have shown to count half against what holds for all sessions
MOOD_MEMORY = 0.9  # of a session's evidence is left after a round in which it was asked
MAX_RATE = 0.98


@dataclass(frozen=True, slots=True)
class Offer:
    """One session's tree of a round, whole.

    parents: of the n nodes; -1 hangs on the root. chances: the drafter's estimate of each node given its parent. kinds:
    what it is compared with, other nodes of its stage with such a chance.
    """

    session_id: str
    tokens: list[int]
    parents: list[int]
    chances: list[float]
    kinds: list[int]

    @classmethod
    def of(cls, session_id: str, tree: TokenTree) -> Offer:
        parents = tree.parents.tolist()
        scores = [min(max(score, 1e-6), 1.0) for score in tree.scores.tolist()]
        chances = [min(s / scores[p], 1.0) if p >= 0 else s for s, p in zip(scores, parents)]
        kinds = [BINS * stage + bisect_left(SCORE_EDGES, c) for stage, c in zip(tree.stages.tolist(), chances)]
        return cls(session_id, tree.tokens.tolist(), parents, chances, kinds)


@dataclass(slots=True)
class _Mood:
    """Of late, in one session: guesses that were right, and how many should have been."""

    hits: float = 0.0
    expected: float = 0.0

    @property
    def factor(self) -> float:
        return (self.hits + MOOD_WEIGHT) / (self.expected + MOOD_WEIGHT)


class Calibration:
    """Acceptance of a node given its parent was accepted."""

    def __init__(self) -> None:
        self._trials, self._hits = [0.0] * (len(Origin) * BINS), [0.0] * (len(Origin) * BINS)
        self._moods: dict[str, _Mood] = {}

    def scores(self, offers: Sequence[Offer]) -> list[list[float]]:
        """Each session's calibrated path probabilities; never larger than the parent's."""
        return [self._scores(offer) for offer in offers]

    def observe(self, offers: Sequence[Offer], emitted: Sequence[Sequence[int] | None]) -> None:
        """``emitted``: what the target then emitted in each session, the bonus token last; None where it failed."""
        for offer, token_ids in zip(offers, emitted):
            if offer.parents and token_ids:
                self._observe(offer, token_ids)

    def forget(self, session_id: str) -> None:
        self._moods.pop(session_id, None)

    def _scores(self, offer: Offer) -> list[float]:
        mood = self._moods.get(offer.session_id)
        factor = mood.factor if mood else 1.0
        path: list[float] = []
        for parent, chance, kind in zip(offer.parents, offer.chances, offer.kinds):
            rate = min(MAX_RATE, factor * self._rate(kind, chance))
            path.append(rate * path[parent] if parent >= 0 else rate)
        return path

    def _observe(self, offer: Offer, emitted: Sequence[int]) -> None:
        """Counts nodes next to an emitted token: their parent lies on the emitted path, and a token followed there."""
        path = emitted_path(offer, emitted)
        followed, right = {-1, *path[: len(emitted) - 1]}, set(path)
        tested = [node for node, parent in enumerate(offer.parents) if parent in followed]
        expected = sum(self._rate(offer.kinds[node], offer.chances[node]) for node in tested)
        for node in tested:
            kind = offer.kinds[node]
            keep = min(1.0, MAX_TRIALS / (self._trials[kind] + 1.0))
            self._trials[kind] = keep * (self._trials[kind] + 1.0)
            self._hits[kind] = keep * (self._hits[kind] + (node in right))
        mood = self._moods.get(offer.session_id)
        if mood is None:
            mood = self._moods[offer.session_id] = _Mood()
        mood.hits = MOOD_MEMORY * mood.hits + len(path)
        mood.expected = MOOD_MEMORY * mood.expected + expected

    def _rate(self, kind: int, chance: float) -> float:
        return (self._hits[kind] + PRIOR_TRIALS * chance) / (self._trials[kind] + PRIOR_TRIALS)


def emitted_path(tree: Offer | TokenTree, emitted: Sequence[int]) -> list[int]:
    """The tree's nodes along the emitted tokens, from the root down; the first of equal siblings."""
    path: list[int] = []
    at, left = -1, iter(emitted)
    wanted = next(left, None)
    for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens)):  # children stand behind their parents
        if wanted is None:
            break
        if parent == at and token == wanted:
            path.append(node)
            at, wanted = node, next(left, None)
    return path

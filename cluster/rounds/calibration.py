"""What a drafter's scores are worth: measured acceptance by stage and score, and by the session's present text.

Evidence is free: whatever the target emitted shows which guesses were right, also among those that were not verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.core.token_tree import TokenTree

SCORE_EDGES = np.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 0.95])
PRIOR_TRIALS = 8.0  # weight of "the drafter's own estimate is right" against what was observed
MAX_TRIALS = 400.0  # of one kind of node are remembered: what changes for all sessions shows after some hundred rounds
MOOD_WEIGHT = 2.0  # hits that a session must have shown to count half against what holds for all sessions
MOOD_MEMORY = 0.9  # of a session's evidence is left after a round in which it was asked
MAX_RATE = 0.98

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Offers:
    """One round's trees, whole, one behind the other: n nodes of all sessions.

    ends: (sessions,) index behind each session's last node. parents: (n,) index among all nodes; -1 hangs on its root.
    places: (n,) stage and (n,) bin of ``conditional``, the drafter's (n,) estimates of each node given its parent.
    """

    session_ids: Sequence[str]
    trees: Sequence[TokenTree]
    ends: list[int]
    parents: npt.NDArray[np.int64]
    conditional: Float64Array
    places: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]

    @classmethod
    def of(cls, session_ids: Sequence[str], trees: Sequence[TokenTree]) -> Offers:
        """The sessions' trees as one table, so that a round costs a few array operations and not a few per session."""
        ends = list(accumulate(map(len, trees)))
        parents = _joined([tree.parents for tree in trees]).astype(np.int64)
        if len(trees) > 1:
            sizes = [len(tree) for tree in trees]
            parents = np.where(parents >= 0, parents + np.repeat(np.array(ends) - sizes, sizes), -1)
        scores = np.ones(len(parents) + 1)
        scores[:-1] = _joined([tree.scores for tree in trees])
        np.clip(scores, 1e-6, 1.0, out=scores)
        conditional = np.minimum(scores[:-1] / scores[parents], 1.0)
        places = _joined([tree.stages for tree in trees]), np.searchsorted(SCORE_EDGES, conditional)
        return cls(session_ids, trees, ends, parents, conditional, places)


def _joined(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)  # one session alone is in a hurry


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
        shape = (3, len(SCORE_EDGES) + 1)
        self._trials, self._hits = np.zeros(shape), np.zeros(shape)
        self._moods: dict[str, _Mood] = {}

    def scores(self, offers: Offers) -> list[Float64Array]:
        """Each session's calibrated path probabilities; never larger than the parent's."""
        path = self._rates(offers).tolist()
        start = 0
        for session_id, end in zip(offers.session_ids, offers.ends):
            mood = self._moods.get(session_id)
            factor = mood.factor if mood else 1.0
            for node, parent in enumerate(offers.parents[start:end].tolist(), start):
                rate = min(MAX_RATE, path[node] * factor)
                path[node] = rate * path[parent] if parent >= 0 else rate
            start = end
        whole = np.array(path, np.float64)
        return [whole[end - len(tree) : end] for tree, end in zip(offers.trees, offers.ends)]

    def observe(self, offers: Offers, emitted: Sequence[Sequence[int] | None]) -> None:
        """``emitted``: what the target then emitted in each session, the bonus token last; None where it failed.

        Counts every node next to an emitted token: its parent lies on the emitted path, and a token followed there.
        """
        hit, followed = np.zeros((2, len(offers.parents) + 1), np.bool_)
        followed[-1] = True  # the roots, addressed by parent -1
        paths: list[list[int]] = []
        for tree, end, token_ids in zip(offers.trees, offers.ends, emitted):
            path = [node + end - len(tree) for node in emitted_path(tree, token_ids or ())]
            hit[path] = True
            followed[path[: len(token_ids or ()) - 1]] = True
            paths.append(path)
        tested = followed[offers.parents]
        rates = np.where(tested, self._rates(offers), 0.0)
        for session_id, tree, end, token_ids, path in zip(
            offers.session_ids, offers.trees, offers.ends, emitted, paths
        ):
            if token_ids is None:
                tested[end - len(tree) : end] = False
            elif len(tree):
                mood = self._moods.setdefault(session_id, _Mood())
                mood.hits = MOOD_MEMORY * mood.hits + len(path)
                mood.expected = MOOD_MEMORY * mood.expected + float(rates[end - len(tree) : end].sum())
        stages, bins = offers.places
        np.add.at(self._trials, (stages[tested], bins[tested]), 1.0)
        np.add.at(self._hits, (stages[tested], bins[tested]), hit[:-1][tested])
        keep = np.minimum(1.0, MAX_TRIALS / np.maximum(self._trials, 1.0))
        self._trials *= keep
        self._hits *= keep

    def forget(self, session_id: str) -> None:
        self._moods.pop(session_id, None)

    def _rates(self, offers: Offers) -> Float64Array:
        trials, hits = self._trials[offers.places], self._hits[offers.places]
        rates: Float64Array = (hits + PRIOR_TRIALS * offers.conditional) / (trials + PRIOR_TRIALS)
        return rates


def emitted_path(tree: TokenTree, token_ids: Sequence[int]) -> list[int]:
    """The tree's nodes along the emitted tokens, from the root down; the first of equal siblings."""
    if not len(tree) or not token_ids:
        return []
    places: dict[tuple[int, int], int] = {}
    for node, place in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist())):
        places.setdefault(place, node)
    path: list[int] = []
    at = -1
    for token in token_ids:
        at = places.get((at, token), -1)
        if at < 0:
            break
        path.append(at)
    return path

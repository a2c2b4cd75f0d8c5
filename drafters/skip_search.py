"""The search for the sub-layers to leave out, from the text that is being generated (SWIFT, arXiv 2410.06916).

A *window* is a stretch of committed text. On each the incumbent is scored anew before anything else, so a lucky first
score does not last, and a candidate is judged by the tokens on which the two differ: how hard the window is drops out.
A candidate that does better on one window is a *challenger*: it becomes the incumbent once fresh windows, which had no
part in choosing it, say so too. Ties keep the incumbent. The search rests when nothing better was found for long, and
wakes when the incumbent's matchness falls: the text is of another kind now. What served before is then tried first.

Pure bookkeeping: no torch, no clock. ``drafters/matchness.py`` scores, ``drafters/swift.py`` decides when.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.core.errors import ConfigError
from drafters.skip_proposals import MOST_SCORES, Proposer, Score, SkipSet, SkipSpace

Hits = npt.NDArray[np.bool_]

TRIES = 8  # candidates scored on one window, at most
CHALLENGE_Z = 1.0  # of the first window's difference, in standard deviations, makes a challenger ...
ADOPT_Z = 1.5  # ... and of the fresh windows' makes an incumbent,
CONFIRMING = (2, 8)  # which takes so many of them at least, and at most
PATIENCE = 200  # candidates in a row that were no better: the search rests
LEVEL_TOKENS = 256  # scored with an incumbent before its matchness counts as known
SLACK = 0.05  # matchness may be so much lower for a while ...
DRIFT_TOKENS = 20.0  # ... and a drop is one once it has cost so many tokens beyond
LIBRARY = 8  # sets that were incumbents, kept for texts of their kind


@dataclass(slots=True)
class _Duel:
    """A challenger's record on windows behind the one that made it one."""

    skip: SkipSet
    won: int = 0
    lost: int = 0
    windows: int = 0


class SkipSearch:
    """One space, one incumbent. Per window: ``open``, then ``ask`` and ``tell`` in turn until ``ask`` gives None."""

    def __init__(
        self, space: SkipSpace, proposer: Proposer, incumbent: SkipSet, *, library: Iterable[SkipSet] = ()
    ) -> None:
        """``library``: sets to try before others. Raises ``ConfigError`` for an incumbent outside the space."""
        if incumbent not in space:
            raise ConfigError(f"skip: {sorted(incumbent)} is no set of {space.count} inner sub-layers")
        self.incumbent = incumbent
        self.resting = False
        self.trials = 0
        self.adopted = 0
        self._space = space
        self._proposer = proposer
        self._scores: deque[Score] = deque(maxlen=MOST_SCORES)
        self._library = [skip for skip in library if skip in space and skip != incumbent]
        self._first = list(self._library)  # to be tried before the proposer is asked
        self._fails = 0
        self._tokens, self._hits, self._drop = 0, 0, 0.0
        self._duel: _Duel | None = None
        self._baseline: Hits | None = None
        self._asked: SkipSet | None = None
        self._tries = 0

    @property
    def matchness(self) -> float:
        """The incumbent's share of guesses that were right, over all windows since its adoption; nan before any."""
        return self._hits / self._tokens if self._tokens else math.nan

    def open(self) -> None:
        """The next window is another one. What was asked and not told is void."""
        self._baseline, self._asked, self._tries = None, None, 0

    def ask(self) -> SkipSet | None:
        """The set to score on this window; None where the window is of no more use."""
        if self._baseline is None:
            self._asked = self.incumbent
        elif self._duel is not None:
            # A challenger needs fresh windows; to look for another one meanwhile would only crowd them.
            self._asked = None if self._tries else self._duel.skip
        elif self.resting or self._tries >= TRIES:
            self._asked = None
        else:
            self._asked = self._first[0] if self._first else self._propose()
        return self._asked

    def tell(self, hits: Hits) -> None:
        """``hits``: (n,) bool, which of the window's n tokens the asked set guesses. Raises ``ValueError`` unasked."""
        if self._asked is None:
            raise ValueError("no set was asked about")
        skip, self._asked = self._asked, None
        if self._baseline is None:
            self._baseline = hits
            self._observe(hits)
            return
        self._tries += 1
        won = int((hits & ~self._baseline).sum())
        lost = int((self._baseline & ~hits).sum())
        if self._duel is not None:
            self._judge(self._duel, won, lost)
            return
        self.trials += 1
        self._first = [other for other in self._first if other != skip]
        self._scores.append(Score(skip, self.matchness + (won - lost) / len(hits)))
        if won > lost and _z(won, lost) >= CHALLENGE_Z:
            self._duel = _Duel(skip)
        else:
            self._fail()

    def state(self) -> dict[str, Any]:
        """All that ``restore`` needs, as plain JSON. A window that is open, and a duel, are begun anew."""
        return {
            "num_layers": self._space.num_layers,
            "count": self._space.count,
            "skip": sorted(self.incumbent),
            "matchness": {"hits": self._hits, "tokens": self._tokens},
            "trials": self.trials,
            "adopted": self.adopted,
            "fails": self._fails,
            "resting": self.resting,
            "library": [sorted(skip) for skip in self._library],
            "scores": [[sorted(score.skip), score.matchness] for score in self._scores],
        }

    @classmethod
    def restore(cls, space: SkipSpace, proposer: Proposer, state: dict[str, Any]) -> SkipSearch:
        """Go on where ``state`` was taken. Raises ``ConfigError`` for the state of another space."""
        if (state["num_layers"], state["count"]) != (space.num_layers, space.count):
            raise ConfigError(
                f"this search was for {state['count']} sub-layers of {state['num_layers']} layers,"
                f" not {space.count} of {space.num_layers}"
            )
        search = cls(space, proposer, frozenset(state["skip"]), library=map(frozenset, state["library"]))
        search._first = []
        search._hits, search._tokens = state["matchness"]["hits"], state["matchness"]["tokens"]
        search.trials, search.adopted = state["trials"], state["adopted"]
        search._fails, search.resting = state["fails"], state["resting"]
        search._scores.extend(Score(frozenset(skip), share) for skip, share in state["scores"])
        return search

    def _propose(self) -> SkipSet:
        return self._proposer.propose(self.incumbent, list(self._scores), self.trials)

    def _judge(self, duel: _Duel, won: int, lost: int) -> None:
        duel.won, duel.lost, duel.windows = duel.won + won, duel.lost + lost, duel.windows + 1
        least, most = CONFIRMING
        if duel.windows < least:
            return
        if duel.won > duel.lost and _z(duel.won, duel.lost) >= ADOPT_Z:
            self._adopt(duel.skip)
        elif duel.won <= duel.lost or duel.windows >= most:
            self._duel = None
            self._fail()

    def _adopt(self, skip: SkipSet) -> None:
        others = [other for other in self._library if other not in (skip, self.incumbent)]
        self._library = [self.incumbent, *others][:LIBRARY]
        self.incumbent, self._duel = skip, None
        self.adopted += 1
        self._fails = 0
        self._tokens, self._hits, self._drop = 0, 0, 0.0
        self.open()

    def _fail(self) -> None:
        self._fails += 1
        self.resting = self._fails >= PATIENCE and not self._first

    def _observe(self, hits: Hits) -> None:
        """The incumbent on a fresh window: its matchness, and whether that has fallen for good (a CUSUM test)."""
        right, count = int(hits.sum()), len(hits)
        if self._tokens >= LEVEL_TOKENS:
            self._drop = max(0.0, self._drop + (self.matchness - SLACK) * count - right)
            if self._drop > DRIFT_TOKENS:
                self._first = list(self._library)
                self.resting, self._fails = False, 0
                self._tokens, self._hits, self._drop = 0, 0, 0.0
        self._tokens += count
        self._hits += right


def _z(won: int, lost: int) -> float:
    """McNemar's statistic: the difference between the two, in standard deviations of a fair coin's."""
    return (won - lost) / math.sqrt(won + lost) if won + lost else 0.0

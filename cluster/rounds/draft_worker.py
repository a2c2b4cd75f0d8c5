"""Host of any drafter: follows the target's commits, answers asks, forgets sessions nobody asks about.

A plain class, called from one thread; the Ray actor around it is in ``cluster.launch``. Whatever arrives here may be
late, doubled, out of order or for a session this worker never saw, and the drafter itself may fail: it answers with
what it holds, never with an error that would cost other sessions their trees.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.core.errors import InvalidTree
from cluster.core.token_tree import TokenTree
from cluster.core.types import TreeKey
from cluster.rounds.guard import GuardedDrafter
from cluster.rounds.messages import DraftAsk, DraftReply, StageReport
from drafters.base import Ask, Drafter
from drafters.staged import fill_in

log = logging.getLogger(__name__)

END_MEMORY_S = 5.0  # a session's start that its end has overtaken is this late at most


@dataclass(slots=True)
class _Held:
    key: TreeKey
    last_used: float


@dataclass(frozen=True, slots=True)
class _Ended:
    """When a session was ended, and at what length; inf where it was not held."""

    at: float
    base: float


class DraftWorker:
    """One stage's drafter and the sessions it holds, each named by its verifier and session id.

    Sessions not asked about for ``ttl_s`` are dropped, whoever should have ended them.
    """

    def __init__(
        self,
        stage: str,
        drafter: Drafter,
        ttl_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage = stage
        self._drafter = GuardedDrafter(drafter)
        self._ttl_s = ttl_s
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._ended: dict[str, _Ended] = {}

    @property
    def num_sessions(self) -> int:
        return len(self._held)

    def draft(self, verifier: str, asks: Sequence[DraftAsk], upstream: DraftReply | None = None) -> DraftReply:
        """Apply every ask's commit, then propose trees for those that want one and could be followed."""
        start = self._clock()
        self.drop_idle()
        resync: list[str] = []
        wanted: dict[str, Ask] = {}
        keys: dict[str, TreeKey] = {}
        for ask in asks:
            name = _name(verifier, ask.commit.key.session_id)
            if not self._follow(name, ask):
                resync.append(ask.commit.key.session_id)
            elif self._held[name].key == ask.commit.key and ask.max_nodes > 0 and ask.max_depth > 0:
                wanted[name] = Ask(name, ask.max_nodes, ask.max_depth, ask.outcomes)
                keys[name] = ask.commit.key
        hints = self._hints(verifier, upstream, keys)
        trees = fill_in(list(wanted.values()), hints, self._drafter.propose(list(wanted.values()), hints))
        for name in [name for name in wanted if not self._drafter.holds(name)]:
            del self._held[name]
            resync.append(keys[name].session_id)
        report = StageReport(
            self.stage,
            os.getpid(),
            {
                ask.commit.key.session_id: self._held[name].key.base
                for ask in asks
                if (name := _name(verifier, ask.commit.key.session_id)) in self._held
            },
            tuple(resync),
            self._clock() - start,
        )
        return DraftReply(
            {keys[name].session_id: tree.with_key(keys[name]) for name, tree in trees.items()},
            (*(upstream.reports if upstream else ()), report),
        )

    def end(self, verifier: str, session_id: str) -> None:
        """Free a session, also one whose start is still on its way: ends and starts come by different routes."""
        now, name = self._clock(), _name(verifier, session_id)
        held = self._held.get(name)
        ended = _Ended(now, held.key.base if held else math.inf)
        self._ended = {other: end for other, end in self._ended.items() if now - end.at < END_MEMORY_S} | {name: ended}
        self._end(name)

    def idle_seconds(self, verifier: str, session_id: str) -> float | None:
        """Seconds since the session was last asked about; None where it is not held."""
        held = self._held.get(_name(verifier, session_id))
        return self._clock() - held.last_used if held else None

    def _follow(self, name: str, ask: DraftAsk) -> bool:
        """Bring the session to ``ask.commit``'s state. False where that takes a resync."""
        target, held = ask.commit.key, self._held.get(name)
        if ask.start is not None and self._from_before_its_end(name, target):
            return False
        if ask.start is not None and (held is None or _newer(target, held.key)):
            start = ask.start
            if not self._drafter.begin(name, start.token_ids, start.params, start.prompt_len, start.owner):
                self._held.pop(name, None)
                return False
            self._held[name] = _Held(target, self._clock())
            return True
        if held is None or held.key.epoch < target.epoch:
            return False
        held.last_used = self._clock()
        if held.key.epoch > target.epoch or target.base <= held.key.base:
            # An old message: what is held is newer, or it is what was asked for. A digest that differs at the same
            # length means this worker followed another outcome.
            return held.key.base != target.base or held.key.epoch != target.epoch or held.key == target
        if ask.commit.base > held.key.base:
            return False
        if not self._drafter.commit(name, ask.commit.token_ids[held.key.base - ask.commit.base :]):
            self._held.pop(name, None)
            return False
        held.key = target
        return True

    def _from_before_its_end(self, name: str, key: TreeKey) -> bool:
        """Whether a start is older than the session's end. One that was set aside begins again with more text."""
        ended = self._ended.get(name)
        return ended is not None and self._clock() - ended.at < END_MEMORY_S and key.base <= ended.base

    def _hints(self, verifier: str, upstream: DraftReply | None, keys: dict[str, TreeKey]) -> dict[str, TokenTree]:
        """The upstream stage's trees that hang on exactly the state asked about; rubbish is left out."""
        hints: dict[str, TokenTree] = {}
        for session_id, tree in (upstream.trees if upstream else {}).items():
            name = _name(verifier, session_id)
            if name in keys and tree.key == keys[name]:
                try:
                    tree.check(self._drafter.vocab_size)
                except InvalidTree as error:
                    log.warning("upstream tree of %s is refused: %s", name, error)
                else:
                    hints[name] = tree
        return hints

    def drop_idle(self) -> None:
        """Free what nobody asks about: its end may have been lost on the way. Every ``draft`` does so first."""
        now = self._clock()
        for name in [name for name, held in self._held.items() if now - held.last_used > self._ttl_s]:
            self._end(name)

    def _end(self, name: str) -> None:
        if self._held.pop(name, None):
            self._drafter.end(name)


def _name(verifier: str, session_id: str) -> str:
    """Sessions of different targets never meet, whatever ids their clients chose."""
    return f"{verifier}/{session_id}"


def _newer(key: TreeKey, held: TreeKey) -> bool:
    return (key.epoch, key.base) > (held.epoch, held.base) or (
        (key.epoch, key.base) == (held.epoch, held.base) and key.digest != held.digest
    )

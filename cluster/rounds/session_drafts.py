"""What a target knows of one session's drafts: what its stages hold, what was asked of them, what came.

Only the pipeline uses it, and under its lock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cluster.core.token_tree import TokenTree
from cluster.core.types import Commit, Origin, SamplingParams, TreeKey
from cluster.rounds.messages import DraftAsk, SessionStart

MAX_DEPTH = 32
WORTH_TAKING = 0.25  # accepted nodes that a tree from the cache must promise; else the round would rather wait

Counts = npt.NDArray[np.int64]
"""(3,) numbers of nodes, by ``Origin``."""


def count_nodes(tree: TokenTree) -> Counts:
    """By who guessed them first. The tree is a checked one."""
    return np.bincount(tree.stages, minlength=len(Origin))


class Drafted(Protocol):
    """A text being generated, as far as drafters care: a ``Session``, or a row of another engine's batch."""

    @property
    def id(self) -> str: ...

    @property
    def tokens(self) -> list[int]:
        """Prompt and output so far."""
        ...

    @property
    def prompt_len(self) -> int: ...

    @property
    def params(self) -> SamplingParams: ...

    @property
    def owner(self) -> str: ...

    @property
    def base(self) -> int:
        """How many tokens there are."""
        ...

    @property
    def key(self) -> TreeKey: ...

    @property
    def max_depth(self) -> int:
        """How deep a tree may be."""
        ...


@dataclass(frozen=True, slots=True)
class ArrivedTree:
    """A tree that arrived: who sent it, and when."""

    tree: TokenTree
    stage: str
    arrived_s: float


@dataclass(slots=True)
class SessionDrafts:
    """``held``: length each stage's worker acknowledged. ``started``: when a stage was last sent the session's start,
    ``starting_s``: when one first was since any held it; ``refusals``: how often in a row it has answered that it
    does not hold the session.

    ``present``: the state last asked about; the session itself may be moving on while a reply is looked at. ``chain``,
    ``heard``, ``trees``: stages of the ask under way and their workers, those that answered it, and with what;
    ``asked_s``: when it was sent; ``last_stage``: whose tree comes last; ``silent_since``: by stage and worker, the
    first ask since its last answer. ``leasing_s``, ``leased_s``: when workers were first and last asked for.
    ``newest``: the last draft that came, in time or not; ``verified``: how many of its nodes were; ``cached``: what the
    latest tokens have left of it.
    """

    session: Drafted
    held: dict[str, int] = field(default_factory=dict)
    started: dict[str, float] = field(default_factory=dict)
    starting_s: float = math.inf
    refusals: Counter[str] = field(default_factory=Counter)
    leasing_s: float = math.inf
    leased_s: float = -math.inf
    present: TreeKey | None = None
    asked_s: float = -math.inf
    last_stage: str = ""
    silent_since: dict[tuple[str, Hashable], float] = field(default_factory=dict)
    waiting_for: TreeKey | None = None
    chain: dict[str, Hashable] = field(default_factory=dict)
    heard: set[str] = field(default_factory=set)
    trees: dict[str, ArrivedTree] = field(default_factory=dict)
    failed: bool = False
    newest: ArrivedTree | None = None
    cached: ArrivedTree | None = None
    verified: Counts = field(default_factory=lambda: np.zeros(len(Origin), np.int64))

    @property
    def waiting(self) -> bool:
        cached = self.cached is not None and float(self.cached.tree.scores.sum()) >= WORTH_TAKING
        there = cached or self.failed
        return self.waiting_for is not None and not there and next(reversed(self.chain)) not in self.heard

    def clear(self) -> None:
        self.waiting_for, self.chain, self.failed, self.cached = None, {}, False, None
        self.heard, self.trees = set(), {}

    def wait_for(self, chain: Mapping[str, Hashable]) -> None:
        """An ask on the present state has gone out to these stages' workers."""
        self.chain, self.waiting_for = dict(chain), self.session.key
        for place in chain.items():
            self.silent_since.setdefault(place, self.asked_s)

    def broken_off(self, stage: str, worker: Hashable) -> None:
        """A call to that worker of the stage, or to whoever it was where it is None, has failed."""
        self.failed |= stage in self.chain and worker in (None, self.chain[stage])
        for place in [(s, w) for s, w in self.silent_since if s == stage and worker in (None, w)]:
            del self.silent_since[place]

    def silent(self, now: float, late_after_s: float | None) -> str | None:
        """The first stage of the chain that has not answered; with ``late_after_s``, not for so long."""
        if late_after_s is None:
            return next((stage for stage in self.chain if stage not in self.heard), None)
        return next(
            (s for s, w in self.chain.items() if now - self.silent_since.get((s, w), now) >= late_after_s), None
        )

    def best(self) -> ArrivedTree | None:
        """That of the last stage that sent one, or else the cached one, if it hangs on the present state."""
        draft = next((self.trees[stage] for stage in reversed(self.chain) if stage in self.trees), self.cached)
        return draft if draft is not None and draft.tree.key == self.session.key else None

    def ask(self, stage: str, max_nodes: int, outcomes: bool = False) -> DraftAsk:
        """For a tree behind everything since the length that stage's worker acknowledged."""
        session, held = self.session, self.held[stage]
        commit = Commit(session.key, held, tuple(session.tokens[held:]))
        return DraftAsk(commit, max_nodes, min(session.max_depth, MAX_DEPTH), outcomes=outcomes)

    def start(self, stage: str, now: float) -> DraftAsk:
        """Everything that stage's worker needs to begin."""
        session = self.session
        self.started[stage] = now
        if not self.held:
            self.starting_s = min(self.starting_s, now)
        start = SessionStart(tuple(session.tokens), session.prompt_len, session.params, session.owner)
        return DraftAsk(Commit(session.key, session.base, ()), 0, 0, start)

    def look_up(self) -> None:
        """Walk the tokens since the newest tree's state into that tree."""
        newest = self.newest
        if newest is not None and newest.tree.key is not None:
            tree = newest.tree.after(self.session.tokens[newest.tree.key.base :])
            if len(tree):
                self.cached = replace(newest, tree=tree.with_key(self.session.key))

    def knows(self, key: object) -> bool:
        """Whether a stage may have been asked about that state."""
        present = self.present
        if present is None or not isinstance(key, TreeKey) or type(key.base) is not int or key.base < 0:
            return False
        own = (key.session_id, key.epoch) == (present.session_id, present.epoch)
        return own and (key == present or key.base < present.base)

    def keep(self, draft: ArrivedTree) -> Counts:
        """For later look-ups, unless it is of an older state than the one there. Returns the nodes that are wasted now.

        A state's drafts from several stages, or several times, are one: the last of them counts.
        """
        old, key = self.newest, draft.tree.key
        assert key is not None
        if old is None or old.tree.key == key:
            self.newest = draft
            return np.zeros(len(Origin), np.int64)
        assert old.tree.key is not None
        if key.base < old.tree.key.base:
            return count_nodes(draft.tree)
        wasted = self.unverified()
        self.newest, self.verified = draft, np.zeros(len(Origin), np.int64)
        return wasted

    def unverified(self) -> Counts:
        """Nodes of the newest draft that no step has verified."""
        if self.newest is None:
            return np.zeros(len(Origin), np.int64)
        left: Counts = np.maximum(count_nodes(self.newest.tree) - self.verified, 0)
        return left

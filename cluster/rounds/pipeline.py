"""The target's side of drafting: commits go out, trees come in, and nothing here ever blocks a round for long.

Passive: the engine thread calls ``ask`` after a commit and ``collect`` before the next step; replies arrive on the
transport's own thread and land in a mailbox. Which process answers is the transport's business (``DraftTransport``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.core.errors import InvalidTree
from cluster.core.token_tree import TokenTree
from cluster.core.types import Commit, TreeKey
from cluster.rounds.messages import DraftAsk, DraftReply, SessionStart
from cluster.rounds.session import Session

log = logging.getLogger(__name__)

MISSES_TO_OPEN = 2  # a stage that misses this many deadlines in a row is left out ...
PROBE_INTERVAL_S = 1.0  # ... and asked again this often, without anyone waiting for it
MAX_DEPTH = 32
SYNC_PATIENCE_S = 5.0  # a worker that did not confirm a session's start by then is sent it again


@dataclass(frozen=True, slots=True)
class ChainAsk:
    """One session's asks of a round, by stage in chain order: the last stage's tree is what comes back."""

    session_id: str
    asks: Mapping[str, DraftAsk]


class DraftTransport(Protocol):
    """Carries asks to draft workers. No method blocks; ``draft`` may drop, delay, repeat or reorder replies."""

    def open(self, session_id: str, stages: Sequence[str]) -> None:
        """Get the session a worker of each stage, in the background."""
        ...

    def ready(self, session_id: str, stage: str) -> bool:
        """Whether the session has a worker of that stage now."""
        ...

    def draft(
        self,
        chains: Sequence[ChainAsk],
        deliver: Callable[[DraftReply], None],
        fail: Callable[[str, Sequence[str]], None],
    ) -> None:
        """Send the asks, one call per worker; later call ``deliver(reply)`` or ``fail(stage, session_ids)``.

        Callbacks may come from any thread. Silence is allowed too: the deadline covers it.
        """
        ...

    def leases(self) -> dict[str, int]:
        """Sessions that have a worker now, by stage."""
        ...

    def close(self, session_id: str) -> None:
        """The session is over: let its workers go."""
        ...


@dataclass(slots=True)
class _StageHealth:
    """Circuit breaker of one stage. Open after consecutive misses; a reply within a probe closes it."""

    misses_in_a_row: int = 0
    last_probe: float = 0.0

    @property
    def open(self) -> bool:
        return self.misses_in_a_row >= MISSES_TO_OPEN


@dataclass(slots=True)
class _Asked:
    """What the pipeline knows of one session: lengths its workers acknowledged, and what it is waiting for."""

    session: Session
    held: dict[str, int] = field(default_factory=dict)
    syncing: dict[str, float] = field(default_factory=dict)  # stages that were sent the start, and when
    waiting_for: TreeKey | None = None
    chain: tuple[str, ...] = ()
    tree: TokenTree | None = None


class Pipeline:
    """Drafting stages of one target, over any transport. Thread-safe: the transport delivers from its own thread."""

    def __init__(
        self,
        transport: DraftTransport,
        stages: Sequence[str],
        vocab_size: int,
        max_nodes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stages = tuple(stages)
        self.misses: Counter[str] = Counter({stage: 0 for stage in stages})
        self.late = 0
        self.refused = 0
        self.worker_pids: dict[str, int] = {}
        self._transport = transport
        self._vocab_size = vocab_size
        self._max_nodes = max_nodes
        self._clock = clock
        self._health = {stage: _StageHealth() for stage in stages}
        self._sessions: dict[str, _Asked] = {}
        self._arrived = threading.Condition()

    def open(self, session: Session, stages: Sequence[str]) -> None:
        """Announce a session; leases for ``stages`` are opened in the background."""
        with self._arrived:
            self._sessions[session.id] = _Asked(session)
        self._transport.open(session.id, stages)

    def close(self, session_id: str) -> None:
        with self._arrived:
            known = self._sessions.pop(session_id, None)
        if known is not None:
            self._transport.close(session_id)

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def ask(self, wishes: Sequence[tuple[Session, Sequence[str], int]]) -> None:
        """Ask for trees on the sessions' present state: (session, stages in chain order, max nodes). Returns at once.

        A stage that does not hold a session yet is sent its start, and joins the chain once it has confirmed it: no
        round waits for a drafter's prefill.
        """
        chains: list[ChainAsk] = []
        with self._arrived:
            probing = self._probes_due()
            for session, stages, max_nodes in wishes:
                known = self._sessions.get(session.id)
                if known is None:
                    continue
                known.tree, known.waiting_for = None, None
                usable = [
                    stage
                    for stage in stages
                    if self._transport.ready(session.id, stage) and (not self._health[stage].open or stage in probing)
                ]
                chains += [
                    ChainAsk(session.id, {stage: self._start(known, stage)}) for stage in self._unsynced(known, usable)
                ]
                chain = [stage for stage in usable if stage in known.held]
                if chain and session.max_depth > 0:
                    chains.append(ChainAsk(session.id, {stage: _ask(known, stage, max_nodes) for stage in chain}))
                    known.chain = tuple(chain)
                    if not probing.intersection(chain):
                        known.waiting_for = session.key
        if chains:
            self._transport.draft(chains, self._deliver, self._failed)

    def _unsynced(self, known: _Asked, stages: Sequence[str]) -> list[str]:
        now = self._clock()
        return [
            stage
            for stage in stages
            if stage not in known.held and now - known.syncing.get(stage, -SYNC_PATIENCE_S) >= SYNC_PATIENCE_S
        ]

    def _start(self, known: _Asked, stage: str) -> DraftAsk:
        session = known.session
        known.syncing[stage] = self._clock()
        start = SessionStart(tuple(session.tokens), session.prompt_len, session.params)
        return DraftAsk(Commit(session.key, session.base, ()), 0, 0, start)

    def collect(self, sessions: Sequence[Session], timeout_s: float) -> dict[str, TokenTree]:
        """Trees that hang on the sessions' present state; waits at most ``timeout_s`` for those still under way.

        A stage whose tree did not come in time has missed its deadline; the round goes on without it.
        """
        deadline = self._clock() + timeout_s
        with self._arrived:
            mine = [known for session in sessions if (known := self._sessions.get(session.id))]
            while any(known.waiting_for and known.tree is None for known in mine):
                left = deadline - self._clock()
                if left <= 0 or not self._arrived.wait(left):
                    break
            missed = {known.chain[-1] for known in mine if known.waiting_for and known.tree is None}
            answered = {known.chain[-1] for known in mine if known.waiting_for and known.tree is not None}
            for stage in missed:
                self._missed(stage)
            for stage in answered - missed:
                self._health[stage].misses_in_a_row = 0
            trees = {}
            for known in mine:
                if known.tree is not None and known.tree.key == known.session.key:
                    trees[known.session.id] = known.tree
                known.tree, known.waiting_for = None, None
            return trees

    def leases(self) -> dict[str, int]:
        return self._transport.leases()

    def _probes_due(self) -> set[str]:
        """At most one stage at a time, so that a broken stage is never probed through another broken one."""
        now = self._clock()
        open_stages = [stage for stage, health in self._health.items() if health.open]
        stage = min(open_stages, key=lambda name: self._health[name].last_probe, default=None)
        if stage is None or now - max(self._health[name].last_probe for name in open_stages) < PROBE_INTERVAL_S:
            return set()
        self._health[stage].last_probe = now
        return {stage}

    def _missed(self, stage: str) -> None:
        self.misses[stage] += 1
        health = self._health[stage]
        health.misses_in_a_row += 1
        if health.misses_in_a_row == MISSES_TO_OPEN:
            health.last_probe = self._clock()
            log.warning("stage %s missed %d deadlines: left out until a probe succeeds", stage, MISSES_TO_OPEN)

    def _failed(self, stage: str, session_ids: Sequence[str]) -> None:
        """A call failed outright (its worker died, say): nobody needs to wait for the deadline."""
        with self._arrived:
            self._missed(stage)
            for session_id in session_ids:
                if known := self._sessions.get(session_id):
                    known.waiting_for = None
                    known.syncing.pop(stage, None)
            self._arrived.notify_all()

    def _deliver(self, reply: DraftReply) -> None:
        """A reply arrived (any thread, any order, any number of times)."""
        with self._arrived:
            for report in reply.reports:
                self.worker_pids[report.stage] = report.pid
                if report.stage in self._health and self._health[report.stage].open and not report.resync:
                    log.info("stage %s answered a probe: it is asked again", report.stage)
                    self._health[report.stage].misses_in_a_row = 0
                for session_id, length in report.held.items():
                    if known := self._sessions.get(session_id):
                        known.held[report.stage] = max(length, known.held.get(report.stage, 0))
                        known.syncing.pop(report.stage, None)
                for session_id in report.resync:
                    if known := self._sessions.get(session_id):
                        known.held.pop(report.stage, None)
                        known.syncing.pop(report.stage, None)
                        self._give_up(known)
            for session_id, tree in reply.trees.items():
                self._receive(session_id, tree)
            for session_id in reply.reports[-1].held if reply.reports else ():
                # Answered without a tree: no reason to go on waiting.
                known = self._sessions.get(session_id)
                if known and known.waiting_for and session_id not in reply.trees:
                    self._give_up(known, reply.reports[-1].held[session_id])
            self._arrived.notify_all()

    def _give_up(self, known: _Asked, length: int | None = None) -> None:
        if known.waiting_for and (length is None or length == known.waiting_for.base):
            known.waiting_for = None

    def _receive(self, session_id: str, tree: TokenTree) -> None:
        known = self._sessions.get(session_id)
        if known is None or tree.key is None or known.waiting_for != tree.key:
            self.late += 1
            return
        try:
            tree.check(self._vocab_size, self._max_nodes)
        except InvalidTree as error:
            self.refused += 1
            known.waiting_for = None
            log.warning("a tree for session %s is refused: %s", session_id, error)
        else:
            known.tree = tree


def _ask(known: _Asked, stage: str, max_nodes: int) -> DraftAsk:
    """Everything since the length that stage's worker acknowledged."""
    session, held = known.session, known.held[stage]
    commit = Commit(session.key, held, tuple(session.tokens[held:]))
    return DraftAsk(commit, max_nodes, min(session.max_depth, MAX_DEPTH))

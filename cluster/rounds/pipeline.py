"""The target's side of drafting: commits go out, trees come in, and nothing here ever blocks a round for long.

Passive: the engine thread calls ``ask`` after a commit and ``collect`` before the next step; replies arrive on the
transport's own thread and land in a mailbox. Which process answers is the transport's business (``DraftTransport``).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
START_INTERVAL_S = 1.0  # a stage is sent a session's start this often at most
MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class ChainAsk:
    """One session's asks of a round, by stage in chain order: each stage's answer is the next one's upstream."""

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
        """Send the asks, one call per worker; later call ``deliver(reply)`` for each stage of a chain as it answers,
        or ``fail(stage, session_ids)`` for the one that broke it.

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
    """Circuit breaker of one stage. Open after consecutive misses; a probe answered in time closes it."""

    misses_in_a_row: int = 0
    last_probe: float = -math.inf

    @property
    def open(self) -> bool:
        return self.misses_in_a_row >= MISSES_TO_OPEN


@dataclass(slots=True)
class _Asked:
    """What is known of one session: what each stage holds, what was asked, what came.

    ``held``: length each stage's worker acknowledged. ``started``: when a stage was last sent the session's start.
    ``chain``, ``heard``, ``trees``: stages of the ask under way, those that answered it, and with what; ``asked_s``:
    when it was sent. ``leased``: whether workers were asked for.
    """

    session: Session
    held: dict[str, int] = field(default_factory=dict)
    started: dict[str, float] = field(default_factory=dict)
    leased: bool = False
    asked_s: float = -math.inf
    waiting_for: TreeKey | None = None
    chain: tuple[str, ...] = ()
    heard: set[str] = field(default_factory=set)
    trees: dict[str, TokenTree] = field(default_factory=dict)
    failed: bool = False

    @property
    def waiting(self) -> bool:
        return self.waiting_for is not None and not self.failed and self.chain[-1] not in self.heard

    def clear(self) -> None:
        self.waiting_for, self.chain, self.failed = None, (), False
        self.heard, self.trees = set(), {}

    def best_tree(self) -> TokenTree | None:
        """The tree of the last stage that sent one, if it hangs on the session's present state."""
        tree = next((self.trees[stage] for stage in reversed(self.chain) if stage in self.trees), None)
        return tree if tree is not None and tree.key == self.session.key else None


class Pipeline:
    """Drafting stages of one target, in chain order, over any transport.

    Thread-safe: the transport delivers from its own thread.
    """

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
        self._patience = math.inf  # the present deadline: how long a probe may take
        self._sessions: dict[str, _Asked] = {}
        self._arrived = threading.Condition()

    def open(self, session: Session, stages: Sequence[str]) -> None:
        """Announce a session; leases for those of ``stages`` that are there are opened in the background."""
        with self._arrived:
            self._sessions[session.id] = _Asked(session)
        if stages:
            self.lease(session.id, stages)

    def lease(self, session_id: str, stages: Sequence[str]) -> None:
        """Have leases opened for a session that has none yet."""
        known = self._sessions.get(session_id)
        if known is not None and not known.leased:
            known.leased = True
            self._transport.open(session_id, [stage for stage in self.stages if stage in stages])

    def close(self, session_id: str) -> None:
        with self._arrived:
            known = self._sessions.pop(session_id, None)
        if known is not None and known.leased:
            self._transport.close(session_id)

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def leases(self) -> dict[str, int]:
        return self._transport.leases()

    def reachable(self, session_ids: Iterable[str]) -> bool:
        """Whether any of these sessions has a worker of a stage that is in use."""
        used = [stage for stage, health in self._health.items() if not health.open]
        return any(self._transport.ready(session_id, stage) for session_id in session_ids for stage in used)

    def ask(self, wishes: Sequence[tuple[Session, Sequence[str], int]]) -> set[str]:
        """Ask for trees on the sessions' present state: (session, stages, max nodes). Returns at once.

        Returns the ids of sessions for which a tree is now under way. A stage that does not hold a session yet is sent
        its start, and joins the chain once it has confirmed it: no round waits for a drafter's prefill.
        """
        chains: list[ChainAsk] = []
        under_way: set[str] = set()
        with self._arrived:
            probe = self._due_probe()
            for session, stages, max_nodes in wishes:
                known = self._sessions.get(session.id)
                if known is None:
                    continue
                known.clear()
                usable = [s for s in self.stages if s in stages and self._usable(session.id, s, probe)]
                starts = [stage for stage in usable if self._needs_start(known, stage)]
                chains += [ChainAsk(session.id, {stage: self._start(known, stage)}) for stage in starts]
                chain = [stage for stage in usable if stage in known.held]
                if chain and max_nodes > 0 and session.max_depth > 0:
                    chains.append(ChainAsk(session.id, {stage: _ask(known, stage, max_nodes) for stage in chain}))
                    if probe not in chain:
                        known.chain, known.waiting_for, known.asked_s = tuple(chain), session.key, self._clock()
                        under_way.add(session.id)
            if probe is not None and any(probe in chain.asks for chain in chains):
                self._health[probe].last_probe = self._clock()
        if chains:
            self._transport.draft(chains, self._deliver, self._failed)
        return under_way

    def awaits(self, session_id: str, timeout_s: float) -> bool:
        """Whether a tree for the session is under way, and was asked for less than ``timeout_s`` ago."""
        with self._arrived:
            known = self._sessions.get(session_id)
            return known is not None and known.waiting and self._clock() < known.asked_s + timeout_s

    def collect(self, sessions: Sequence[Session], timeout_s: float) -> dict[str, TokenTree]:
        """Trees that hang on the sessions' present state; those still under way may take ``timeout_s`` from the ask on.

        Where a chain's last stage did not answer in time, an earlier one's tree is taken, and the first stage that did
        not answer has missed its deadline.
        """
        with self._arrived:
            self._patience = timeout_s
            mine = [known for session in sessions if (known := self._sessions.get(session.id))]
            while under_way := [known.asked_s for known in mine if known.waiting]:
                left = max(under_way) + timeout_s - self._clock()
                if left <= 0 or not self._arrived.wait(left):
                    break
            late = {next(stage for stage in k.chain if stage not in k.heard) for k in mine if k.waiting}
            in_time = {stage for known in mine for stage in known.heard.intersection(known.chain)}
            for stage in late:
                self._missed(stage)
            for stage in in_time - late:
                self._health[stage].misses_in_a_row = 0
            trees = {known.session.id: tree for known in mine if (tree := known.best_tree()) is not None}
            for known in mine:
                known.clear()
            return trees

    # --- what to send

    def _usable(self, session_id: str, stage: str, probe: str | None) -> bool:
        return (not self._health[stage].open or stage == probe) and self._transport.ready(session_id, stage)

    def _due_probe(self) -> str | None:
        """At most one stage at a time, so that a broken stage is never probed through another broken one."""
        broken = [stage for stage, health in self._health.items() if health.open]
        if not broken or self._clock() - max(self._health[stage].last_probe for stage in broken) < PROBE_INTERVAL_S:
            return None
        return min(broken, key=lambda stage: self._health[stage].last_probe)

    def _needs_start(self, known: _Asked, stage: str) -> bool:
        return stage not in known.held and self._clock() - known.started.get(stage, -math.inf) >= START_INTERVAL_S

    def _start(self, known: _Asked, stage: str) -> DraftAsk:
        session = known.session
        known.started[stage] = self._clock()
        start = SessionStart(tuple(session.tokens), session.prompt_len, session.params)
        return DraftAsk(Commit(session.key, session.base, ()), 0, 0, start)

    # --- what comes back: any thread, any order, any number of times

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
                    known.failed = stage in known.chain
            self._arrived.notify_all()

    def _deliver(self, reply: DraftReply) -> None:
        """One stage's answer: the last of ``reply.reports`` is its own."""
        if not reply.reports or reply.reports[-1].stage not in self._health:
            return
        report = reply.reports[-1]
        with self._arrived:
            self.worker_pids[report.stage] = report.pid
            health = self._health[report.stage]
            if health.open and not report.resync and self._clock() - health.last_probe <= self._patience:
                log.info("stage %s answered a probe: it is asked again", report.stage)
                health.misses_in_a_row = 0
            for session_id, length in report.held.items():
                known = self._sessions.get(session_id)
                if known and length <= known.session.base:  # more than was ever sent is rubbish
                    known.held[report.stage] = max(length, known.held.get(report.stage, 0))
                    if known.waiting_for and known.waiting_for.base == length and session_id not in reply.trees:
                        known.heard.add(report.stage)
            for session_id in report.resync:
                if known := self._sessions.get(session_id):
                    known.held.pop(report.stage, None)
                    known.heard.add(report.stage)
            for session_id, tree in reply.trees.items():
                self._receive(session_id, report.stage, tree)
            self._arrived.notify_all()

    def _receive(self, session_id: str, stage: str, tree: TokenTree) -> None:
        known = self._sessions.get(session_id)
        if known is None or tree.key is None or known.waiting_for != tree.key:
            self.late += 1
            return
        known.heard.add(stage)
        try:
            tree.check(self._vocab_size, self._max_nodes)
        except InvalidTree as error:
            self.refused += 1
            log.warning("a tree for session %s is refused: %s", session_id, error)
        else:
            known.trees[stage] = tree


def _ask(known: _Asked, stage: str, max_nodes: int) -> DraftAsk:
    """Everything since the length that stage's worker acknowledged."""
    session, held = known.session, known.held[stage]
    commit = Commit(session.key, held, tuple(session.tokens[held:]))
    return DraftAsk(commit, max_nodes, min(session.max_depth, MAX_DEPTH))

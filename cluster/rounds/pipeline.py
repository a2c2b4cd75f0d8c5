"""The target's side of drafting: commits go out, trees come in, and nothing here ever blocks a round for long.

Passive: the engine thread calls ``ask`` after a commit and ``collect`` before the next step; replies arrive on the
transport's own thread and land in a mailbox. Which process answers is the transport's business (``DraftTransport``).

Run-ahead: stages are asked for more nodes than a step verifies. Such a tree is also an outcome cache: where the tokens
that the target emits walk into it, what hangs below is the next round's tree, and nobody waits. So while the target
verifies, the drafters work on the tree after the next one.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from cluster.core.errors import InvalidTree
from cluster.core.stats import StageStats
from cluster.core.token_tree import MAX_NODES, TokenTree
from cluster.core.types import Origin
from cluster.rounds.messages import DraftAsk, DraftReply
from cluster.rounds.session_drafts import ArrivedTree, Counts, Drafted, SessionDrafts, count_nodes
from cluster.rounds.stage_record import StageRecord

log = logging.getLogger(__name__)

START_INTERVAL_S = 1.0  # a stage is sent a session's start this often at most
LEASE_INTERVAL_S = 1.0  # a session's missing leases are asked for so often at most
LEASE_PATIENCE_S = 5.0  # from a session that has no worker after so long nothing is expected ...
MAX_REFUSALS = 3  # ... nor from one that its worker has refused so often
REPLY_WEIGHT = 0.1  # of the newest reply in how long replies take

Deliver = Callable[[Hashable, DraftReply], None]
"""Takes a worker and what it answered."""

Fail = Callable[[str, Hashable, Sequence[str]], None]
"""Takes a stage, the worker that broke the call (None: nobody's fault) and the ids of the sessions concerned."""


@dataclass(frozen=True, slots=True)
class ChainAsk:
    """One session's asks of a round, by stage in chain order: each stage's answer is the next one's upstream."""

    session_id: str
    asks: Mapping[str, DraftAsk]


class DraftTransport(Protocol):
    """Carries asks to draft workers. No method blocks; ``draft`` may drop, delay, repeat or reorder replies."""

    def open(self, session_id: str, stages: Sequence[str]) -> None:
        """Get the session a worker of each stage of which it has none, in the background. One may be lost again, for
        instance because nobody asked for long."""
        ...

    def worker(self, session_id: str, stage: str) -> Hashable:
        """The worker of that stage that the session has now, by anything that tells it from others; None: no worker."""
        ...

    def draft(self, chains: Sequence[ChainAsk], deliver: Deliver, fail: Fail) -> None:
        """Send the asks, one call per worker; later call ``deliver`` for each stage of a chain as it answers, or
        ``fail`` for the one that broke it.

        Callbacks may come from any thread. Silence is allowed too: the deadline covers it.
        """
        ...

    def leases(self) -> dict[str, int]:
        """Sessions that have a worker now, by stage."""
        ...

    def close(self, session_id: str) -> None:
        """The session is over: let its workers go."""
        ...

    def stop(self) -> None:
        """Let all workers go. May block: the engine's thread has ended."""
        ...


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
        run_ahead: int = 0,
        outcomes: bool = False,
    ) -> None:
        """``max_nodes``: of a tree that a round may want; stages are asked for ``run_ahead`` more. ``outcomes``: trees
        are for a verifier of chains, and for the step after the next (``drafters.base.Ask``)."""
        self.stages = tuple(stages)
        self.wanted = 0  # rounds of a session for which its stages were asked ...
        self.cached = 0  # ... and whose tree was in the cache already
        self.missing = 0  # ... or in which no tree came in time
        self.reply_s = 0.0  # from an ask to its chain's last tree, of late
        self.worker_pids: dict[str, int] = {}
        self._transport = transport
        self._vocab_size = vocab_size
        self._run_ahead = run_ahead
        self._outcomes = outcomes
        self._most_nodes = min(max_nodes + run_ahead, MAX_NODES)
        self._clock = clock
        self._records = {stage: StageRecord(stage) for stage in stages}
        names = {origin: origin.name.lower() for origin in Origin}
        self._guessers = [(origin, self._records[name]) for origin, name in names.items() if name in self._records]
        self._patience = math.inf  # the present deadline: how long a probe may take
        self._sessions: dict[str, SessionDrafts] = {}
        self._arrived = threading.Condition()

    def open(self, session: Drafted, stages: Sequence[str]) -> None:
        """Announce a session; leases for those of ``stages`` that are there are opened in the background."""
        with self._arrived:
            self._sessions[session.id] = SessionDrafts(session)
        if stages:
            self.lease(session.id, stages)

    def lease(self, session_id: str, stages: Sequence[str]) -> None:
        """Have leases opened of those of ``stages`` of which the session has none. May be called in every round."""
        known, now = self._sessions.get(session_id), self._clock()
        wanted = [stage for stage in self.stages if stage in stages]
        if known is None or now - known.leased_s < LEASE_INTERVAL_S:
            return
        first = known.leased_s == -math.inf
        if first or any(self._transport.worker(session_id, stage) is None for stage in wanted):
            known.leasing_s, known.leased_s = min(known.leasing_s, now), now
            self._transport.open(session_id, wanted)

    def close(self, session_id: str) -> None:
        """Let the session's workers go. Those that follow it are told the rest of its text first."""
        with self._arrived:
            known = self._sessions.pop(session_id, None)
            if known is None:
                return
            followers = [s for s in self.stages if s in known.held and self._in_use(session_id, s)]
            self._waste(known.unverified())
        if known.leased_s > -math.inf:
            rest = [ChainAsk(session_id, {stage: known.ask(stage, 0)}) for stage in followers]
            if rest:
                self._transport.draft(rest, self._deliver, self._failed)
            self._transport.close(session_id)

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def misses(self) -> dict[str, int]:
        """Deadlines missed, by stage."""
        return {stage: record.misses for stage, record in self._records.items()}

    @property
    def late(self) -> int:
        """Trees that came when their round had begun without them."""
        return sum(record.late for record in self._records.values())

    def stats(self) -> dict[str, StageStats]:
        """By stage; from any thread."""
        with self._arrived:
            for record in self._records.values():
                record.breakers.forget(self._clock())
            return {stage: record.snapshot() for stage, record in self._records.items()}

    def leases(self) -> dict[str, int]:
        return self._transport.leases()

    def reachable(self, session_ids: Iterable[str]) -> bool:
        """Whether any of these sessions has a worker that is in use."""
        with self._arrived:
            return any(self._in_use(session_id, stage) for session_id in session_ids for stage in self.stages)

    def follows(self, session_ids: Iterable[str]) -> bool:
        """Whether each of these sessions is held by a worker that is in use, or stranded: nobody need wait for it."""
        with self._arrived:
            return all(
                (known := self._sessions.get(session_id)) is not None
                and (any(self._in_use(session_id, stage) for stage in known.held) or self.stranded(session_id))
                for session_id in session_ids
            )

    def stranded(self, session_id: str) -> bool:
        """Whether all its workers are left out or refuse it, or it has waited for one, or for its start, for long."""
        with self._arrived:
            workers = [(s, w) for s in self.stages if (w := self._transport.worker(session_id, s)) is not None]
            known = self._sessions.get(session_id)
            if known is None:
                return False
            waiting_s = known.starting_s if workers else known.leasing_s
            useless = [known.refusals[s] >= MAX_REFUSALS or not self._usable(s, w) for s, w in workers]
            return self._clock() - waiting_s > LEASE_PATIENCE_S or (bool(useless) and all(useless))

    @property
    def broken(self) -> bool:
        """Whether any worker is left out."""
        with self._arrived:
            return any(record.breakers.num_open for record in self._records.values())

    def ask(self, wishes: Sequence[tuple[Drafted, Sequence[str], int]]) -> set[str]:
        """Ask for trees on the sessions' present state: (session, stages, max nodes). Returns at once, with the ids of
        sessions for which a tree is now under way.

        A stage that does not hold a session yet is sent its start, and joins the chain once it has confirmed it: no
        round waits for a drafter's prefill, nor for a probe of a worker that is left out, or what comes behind it.
        """
        chains, under_way = list[ChainAsk](), set[str]()
        with self._arrived:
            probe = self._due_probe([(session.id, stage) for session, stages, _ in wishes for stage in stages])
            sent = set[tuple[str, Hashable]]()
            for session, stages, max_nodes in wishes:
                known = self._sessions.get(session.id)
                if known is None:
                    continue
                known.clear()
                known.present = session.key
                workers = {stage: self._transport.worker(session.id, stage) for stage in self.stages if stage in stages}
                usable = {s: w for s, w in workers.items() if self._usable(s, w) or (s, w) == probe}
                starts = {stage: worker for stage, worker in usable.items() if self._needs_start(known, stage)}
                chains += [ChainAsk(session.id, {stage: known.start(stage, self._clock())}) for stage in starts]
                sent.update(starts.items())
                chain = {stage: worker for stage, worker in usable.items() if stage in known.held}
                if chain and max_nodes > 0 and session.max_depth > 0:
                    nodes = min(max_nodes + self._run_ahead, self._most_nodes)
                    asks = {stage: known.ask(stage, nodes, self._outcomes) for stage in chain}
                    chains.append(ChainAsk(session.id, asks))
                    sent.update(chain.items())
                    known.asked_s, known.last_stage = self._clock(), next(reversed(chain))
                    if awaited := dict(takewhile(lambda place: place != probe, chain.items())):
                        known.wait_for(awaited)
                        if self._run_ahead or self._outcomes:
                            known.look_up()
                        under_way.add(session.id)
            if probe is not None and probe in sent:
                self._records[probe[0]].breakers.probed(probe[1], self._clock())
        if chains:
            self._transport.draft(chains, self._deliver, self._failed)
        return under_way

    def awaits(self, session_id: str, timeout_s: float) -> bool:
        """Whether a tree for the session is under way, and was asked for less than ``timeout_s`` ago."""
        with self._arrived:
            known = self._sessions.get(session_id)
            return known is not None and known.waiting and self._clock() < known.asked_s + timeout_s

    def collect(
        self, sessions: Sequence[Drafted], timeout_s: float, late_after_s: float | None = None
    ) -> dict[str, TokenTree]:
        """Trees that hang on the sessions' present state; those still under way may take ``timeout_s`` from the ask on.

        Where a chain's last stage did not answer in time, an earlier one's tree is taken, and the first worker that did
        not answer has missed its deadline. ``late_after_s``: whoever rather goes on than wait may allow more, counted
        from the first ask since that stage's last answer.
        """
        with self._arrived:
            self._patience = timeout_s if late_after_s is None else late_after_s
            mine = [known for session in sessions if (known := self._sessions.get(session.id))]
            asked = [known for known in mine if known.waiting_for is not None]
            while under_way := [known.asked_s for known in mine if known.waiting]:
                left = max(under_way) + timeout_s - self._clock()
                if left <= 0 or not self._arrived.wait(left):
                    break
            now = self._clock()
            late = {
                (stage, known.chain[stage])
                for known in mine
                if known.waiting and (stage := known.silent(now, late_after_s)) is not None
            }
            in_time = {(stage, known.chain[stage]) for known in mine for stage in known.heard.intersection(known.chain)}
            for stage, worker in late:
                self._records[stage].missed(worker, now)
            for stage, worker in in_time - late:
                self._records[stage].breakers.in_time(worker)
            drafts = {known.session.id: draft for known in mine if (draft := known.best()) is not None}
            for draft in drafts.values():
                self._records[draft.stage].used(now - draft.arrived_s)
            self.wanted += len(asked)
            self.cached += sum(known.cached is not None and known.best() is known.cached for known in asked)
            self.missing += sum(known.session.id not in drafts for known in asked)
            for known in mine:
                known.clear()
            return {session_id: draft.tree for session_id, draft in drafts.items()}

    def verified(self, session_id: str, tree: TokenTree) -> None:
        """A step verified ``tree``, which is what the governor left of the one collected for the session."""
        with self._arrived:
            if known := self._sessions.get(session_id):
                known.verified += count_nodes(tree)

    # --- what to send

    def _usable(self, stage: str, worker: Hashable) -> bool:
        return worker is not None and not self._records[stage].breakers.is_open(worker)

    def _in_use(self, session_id: str, stage: str) -> bool:
        """Whether the session has a worker of the stage, and one that is not left out."""
        return self._usable(stage, self._transport.worker(session_id, stage))

    def _due_probe(self, places: Iterable[tuple[str, str]]) -> tuple[str, Hashable] | None:
        """Of the workers (session, stage) that are left out, the one whose turn it is, and of which stage.

        At most one at a time, so that no broken worker is probed through another.
        """
        now, broken = self._clock(), list[tuple[float, str, Hashable]]()
        for record in self._records.values():
            record.breakers.forget(now)
        for session_id, stage in places:
            breakers = self._records[stage].breakers if stage in self._records else None
            if breakers is not None and breakers.num_open:
                worker = self._transport.worker(session_id, stage)
                if breakers.is_open(worker):
                    broken.append((breakers.due_s(worker), stage, worker))
        due_s, stage, worker = min(broken, key=lambda each: each[0], default=(math.inf, "", None))
        return (stage, worker) if due_s <= now else None

    def _needs_start(self, known: SessionDrafts, stage: str) -> bool:
        return stage not in known.held and self._clock() - known.started.get(stage, -math.inf) >= START_INTERVAL_S

    # --- what comes back: any thread, any order, any number of times

    def _failed(self, stage: str, worker: Hashable, session_ids: Sequence[str]) -> None:
        """A call failed outright (its worker died, say): nobody needs to wait for the deadline."""
        with self._arrived:
            self._records[stage].missed(worker, self._clock())
            for session_id in session_ids:
                if known := self._sessions.get(session_id):
                    known.broken_off(stage, worker)
            self._arrived.notify_all()

    def _deliver(self, worker: Hashable, reply: DraftReply) -> None:
        """One stage's answer: the last of ``reply.reports`` is its own."""
        if not reply.reports or reply.reports[-1].stage not in self._records:
            return
        report = reply.reports[-1]
        with self._arrived:
            self.worker_pids[report.stage] = report.pid
            self._records[report.stage].answered(report.seconds)
            if report.held or not report.resync:  # it holds some: that others must begin again is their trouble
                self._records[report.stage].answered_probe(worker, self._clock(), self._patience)
            for session_id, length in report.held.items():
                known = self._sessions.get(session_id)
                if known and type(length) is int and 0 <= length <= known.session.base:  # anything else is rubbish
                    known.silent_since.pop((report.stage, worker), None)
                    known.starting_s = math.inf
                    known.held[report.stage] = max(length, known.held.get(report.stage, 0))
                    if known.waiting_for and known.waiting_for.base == length:  # it took more than the start
                        known.refusals.pop(report.stage, None)
                        if session_id not in reply.trees:
                            known.heard.add(report.stage)
            for session_id in report.resync:
                if known := self._sessions.get(session_id):
                    known.held.pop(report.stage, None)
                    known.refusals[report.stage] += 1
                    known.silent_since.pop((report.stage, worker), None)
                    known.heard.add(report.stage)
            for session_id, tree in reply.trees.items():
                self._receive(session_id, report.stage, worker, tree)
            self._arrived.notify_all()

    def _receive(self, session_id: str, stage: str, worker: Hashable, tree: TokenTree) -> None:
        known, record, now = self._sessions.get(session_id), self._records[stage], self._clock()
        in_time = known is not None and tree.key is not None and known.waiting_for == tree.key
        if known is not None and in_time:
            known.heard.add(stage)
        try:
            tree.check(self._vocab_size, self._most_nodes)
            if known is not None and not known.knows(tree.key):
                raise InvalidTree("it hangs on no state of the session")
        except InvalidTree as error:
            record.refused += 1
            log.warning("a tree for session %s is refused: %s", session_id, error)
            return
        if known is None:  # the session has ended
            record.late += 1
            self._waste(count_nodes(tree))
            return
        if tree.key == known.present and stage == known.last_stage:
            self.reply_s += REPLY_WEIGHT * (now - known.asked_s - self.reply_s)
        draft = ArrivedTree(tree, stage, now)
        self._waste(known.keep(draft))
        if in_time:
            known.trees[stage] = draft
        elif tree.key == known.session.key and now - known.asked_s <= self._patience:
            record.breakers.in_time(worker)  # only that nobody had to wait for it
        else:
            record.late += 1

    def _waste(self, nodes: Counts) -> None:
        for origin, record in self._guessers:
            record.wasted += int(nodes[origin])

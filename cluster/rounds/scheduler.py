"""The loop every round goes through: admit, draft, verify, commit. One thread; only it touches the verifier.

``step`` is the round of ``docs/round.md``. Sessions wait in ``admission``'s order, run once they have a KV slot, are
prefilled in chunks beside the sessions that decode, and leave through ``_vacate`` whatever ended them. A session whose
slot is taken from it waits again, and goes on where it stood.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.core.accept import Accepted
from cluster.core.config import EngineConfig
from cluster.core.errors import EngineFailed, Overloaded, PacelineError
from cluster.core.stats import GovernorReport
from cluster.core.token_tree import TokenTree
from cluster.core.types import Commit, FinishReason, Origin, StreamItem
from cluster.engine.step_cost import CostCurve
from cluster.engine.verifier import Prefill, Verifier, Verify
from cluster.rounds.admission import Placement, PrefixCache, WaitingQueue, choose_victim
from cluster.rounds.drafting import Drafting
from cluster.rounds.governor import Governor, RoundSpent, Shape
from cluster.rounds.guard import GuardedDrafter
from cluster.rounds.meter import Meter
from cluster.rounds.modes import MIXED
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.session import Phase, Session
from cluster.rounds.study import StudyTime
from drafters.base import Drafter

if TYPE_CHECKING:
    from cluster.rounds.tracing import RoundTracer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step yielded for one session: an item, or the error that ended it."""

    session: Session
    item: StreamItem | None = None
    error: PacelineError | None = None


@dataclass(slots=True)
class RoundTimes:
    """Seconds since start-up, by part of the round."""

    draft: float = 0.0
    forward: float = 0.0
    accept: float = 0.0
    other: float = 0.0
    steps: int = 0


class Scheduler:
    """Sessions of one target. ``local`` guesses in this thread; ``pipeline`` reaches drafters elsewhere."""

    def __init__(
        self,
        config: EngineConfig,
        verifier: Verifier,
        curve: CostCurve,
        local: Drafter | None = None,
        pipeline: Pipeline | None = None,
        slots: dict[str, int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        tracer: RoundTracer | None = None,
    ) -> None:
        """``slots`` is kept as the map from running session to KV slot, for drafters that work on the target's KV."""
        self._config = config
        self._verifier = verifier
        self._kv = verifier.rank.kv
        self._clock = clock
        guarded = None if local is None else GuardedDrafter(local, verifier.rank.config.vocab_size)
        self.governor = Governor(config, curve)
        self._drafting = Drafting(config, self.governor, guarded, pipeline, clock)
        self._waiting = WaitingQueue()
        self._running: list[Session] = []
        self._prefilled: dict[str, int] = {}
        self._prefixes = PrefixCache()
        self._slots = {} if slots is None else slots
        self._tracer = tracer
        self.meter = Meter()
        self.times = RoundTimes()
        self.study_time = StudyTime(local)
        self.last_choice = ""

    # --- sessions come and go

    def submit(self, session: Session) -> Outcome | None:
        """Queue a session. Raises ``Overloaded`` where too many wait; an outcome where it is over before it began.

        A replay was admitted before: it is not refused.
        """
        session.arrived_s = self._clock()
        if session.finish_reason is not None:
            session.phase = Phase.FINISHED
            return Outcome(session, session.closing_item())
        waiting = self._waiting.num_new
        if not session.request.admitted and waiting >= self._config.max_waiting + self._kv.num_free:
            self.meter.refused()
            raise Overloaded(f"{waiting} requests wait already, at most {self._config.max_waiting}")
        self._waiting.add(session)
        if self._tracer is not None:
            self._tracer.arrived(session)
        return None

    def abort(self, session: Session) -> None:
        """Drop a session wherever it stands; its KV slot is free when this returns."""
        if session in self._waiting:
            self._waiting.remove(session)
        elif session in self._running:
            self._vacate(session, Phase.FINISHED)
        if session.finish_reason is None:
            session.finish_reason = FinishReason.ABORT
            self.meter.finished(session, FinishReason.ABORT, self._clock())
            if self._tracer is not None:
                self._tracer.ended(session)
        session.phase = Phase.FINISHED

    def preempt(self, session: Session) -> None:
        """Take a running session's slot. It waits again, and will go on with the token it would have had next."""
        self._vacate(session, Phase.WAITING)
        self._waiting.add(session)
        self.meter.preempted()
        if self._tracer is not None:
            self._tracer.preempted(session)

    def report(self) -> GovernorReport:
        """What the governor chooses; from any thread."""
        return self.governor.report(self._drafting.mode)

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def max_waiting(self) -> int:
        return self._config.max_waiting

    @property
    def unread(self) -> int:
        """Prompt tokens of running sessions that no step has read yet."""
        return sum(s.base - self._prefilled[s.id] for s in self._running if s.phase is Phase.PREFILL)

    def study(self) -> bool:
        """Between rounds: let a local drafter that learns do so, where it is time. False: not now, or nothing to do."""
        return self.study_time.step(self.idle)

    # --- the round

    def step(self) -> list[Outcome]:
        """One round: draft (trees that are there), verify, accept, commit. Empty where nothing runs."""
        self._admit()
        if not self._running:
            return []
        start, config = time.perf_counter(), self._config
        decoding = [session for session in self._running if session.phase is Phase.DECODE]
        unread = min(self.unread, config.prefill_chunk) if decoding else self.unread
        decoding = self._drafting.ready(decoding, unread > 0)
        mode = self._drafting.round_mode
        context = _mean([session.base for session in decoding or self._running])
        guesses = self._drafting.guess(decoding, context)
        reserved = min(unread, config.max_rows // 2)  # rows that trees may not take
        trees = self.governor.budget([session.id for session in decoding], guesses, reserved, context)
        drafted = time.perf_counter()
        tree_rows = sum(len(tree) + 1 for tree in trees)
        chunks = self._prefill_chunks(min(unread, config.max_rows - tree_rows))
        prompt_rows = sum(len(tokens) for _, tokens in chunks)
        verifies = [_verify(session, tree) for session, tree in zip(decoding, trees)]
        nodes = tree_rows - len(decoding)
        shape = Shape(len(decoding), nodes, prompt_rows, context, self._drafting.sitting_out)
        prefills, firsts = self._read(chunks)
        emitting = decoding + [session for session, _ in firsts]  # their rows are the prompts', and counted as such
        trees += [TokenTree.empty() for _ in firsts]
        verifies += [work for _, work in firsts]
        blocks, spent = self._verifier.step(prefills, verifies)
        self.governor.learn([block.tokens if isinstance(block, Accepted) else None for block in blocks])
        outcomes, commits = self._commit(emitting, trees, blocks, self.governor.price_of_nodes(shape))
        self._drafting.ask(commits)
        total = time.perf_counter() - start
        parts = RoundSpent(drafted - start, spent.forward, spent.accept, total)
        self._account(mode, shape, parts, outcomes)
        if self._tracer is not None:
            self._tracer.round(mode, parts, zip(trees, outcomes))
        return outcomes

    def _admit(self) -> None:
        while self._waiting:
            if not self._kv.num_free:
                head = self._waiting.head
                patient = self._clock() - head.arrived_s < self._config.preempt_after_s
                victim = choose_victim(head, self._running, patient)
                if victim is None:
                    return
                self.preempt(victim)
            self._begin(self._waiting.pop())

    def _begin(self, session: Session) -> None:
        """Give the session a KV slot, with what is there already of the K/V it needs."""
        place = self._place(session)
        if place.source is None:
            self._kv.allocate(place.slot, keep=place.length)
        else:
            self._kv.allocate(place.slot)
            self._kv.copy(place.source, place.slot, place.length)
        session.admit(place.slot, place.length)
        self._slots[session.id] = place.slot
        self._prefilled[session.id] = place.length
        self._running.append(session)
        now = self._clock()
        self.meter.admitted(session, now)
        if self._tracer is not None:
            self._tracer.admitted(session, now - session.arrived_s)
        self._drafting.begin(session)

    def _place(self, session: Session) -> Placement:
        free = self._kv.free_slots
        if not self._config.prefix_reuse:
            return Placement(next(iter(free)))
        salt = session.request.cache_salt
        alike = (other for other in self._running if other.request.cache_salt == salt)
        running = ((other.slot, other.tokens, self._kv.length(other.slot)) for other in alike)
        return self._prefixes.place(session.tokens[:-1], salt, free, running)

    def _prefill_chunks(self, room: int) -> list[tuple[Session, list[int]]]:
        """``room`` prompt tokens, oldest session first."""
        chunks: list[tuple[Session, list[int]]] = []
        for session in self._running:
            if session.phase is not Phase.PREFILL or room <= 0:
                continue
            at = self._prefilled[session.id]
            chunk = session.tokens[at : at + room]
            chunks.append((session, chunk))
            room -= len(chunk)
        return chunks

    def _read(self, chunks: Sequence[tuple[Session, list[int]]]) -> tuple[list[Prefill], list[tuple[Session, Verify]]]:
        """The step's work on prompts: what is only read, and of sessions whose whole prompt is read by it, what yields
        their first token."""
        prefills: list[Prefill] = []
        firsts: list[tuple[Session, Verify]] = []
        for session, tokens in chunks:
            self._prefilled[session.id] += len(tokens)
            left = session.base - self._prefilled[session.id]
            if left == 0:
                firsts.append((session, _verify(session, TokenTree.empty(), tokens[:-1])))
            else:
                prefills.append(Prefill(session.slot, tokens))
            if left <= 1:  # the root alone is a step of decoding
                session.phase = Phase.DECODE
        return prefills, firsts

    def _commit(
        self,
        emitting: Sequence[Session],
        trees: Sequence[TokenTree],
        blocks: Sequence[Accepted | EngineFailed],
        node_price: float,
    ) -> tuple[list[Outcome], list[tuple[Session, Commit]]]:
        """Stop rules, statistics and release of what ended; the commits of the sessions that go on. ``node_price``:
        tokens that verifying a node cost."""
        outcomes: list[Outcome] = []
        commits: list[tuple[Session, Commit]] = []
        for session, tree, block in zip(emitting, trees, blocks):
            if isinstance(block, EngineFailed):
                outcomes.append(self._fail(session, block))
                continue
            origins = [Origin(int(tree.stages[node])) for node in block.nodes] + [Origin.TARGET]
            try:
                item, commit = session.advance(block.tokens, origins, len(tree))
            except Exception as error:  # its text: the other sessions' tokens are computed already
                log.exception("session %s cannot go on", session.id)
                outcomes.append(self._fail(session, EngineFailed(f"{type(error).__name__} in the session's text")))
                continue
            outcomes.append(Outcome(session, item))
            accepted = block.nodes[: len(item.token_ids)]  # what lies behind a stop is dropped everywhere
            self._drafting.verified(session, tree, len(accepted), node_price * len(tree))
            self.meter.verified(tree, accepted)
            now = self._clock()
            self.meter.emitted(session, item, now)
            if session.finish_reason is not None:
                self.meter.finished(session, session.finish_reason, now)
                self._vacate(session, Phase.FINISHED, last=commit)
            else:
                commits.append((session, commit))
        return outcomes, commits

    def _fail(self, session: Session, error: EngineFailed) -> Outcome:
        """End a session by an error of its own. What its slot holds is not trusted."""
        self.meter.finished(session, "error", self._clock())
        self._vacate(session, Phase.FINISHED, keep=False)
        return Outcome(session, error=error)

    def _vacate(self, session: Session, phase: Phase, keep: bool = True, last: Commit | None = None) -> None:
        """Give back everything the session holds. The one way out of ``_running``; ``last``: the commit that ended it.

        The slot keeps the K/V of committed tokens; of a block that a stop cut, those before the stop.
        """
        self._running.remove(session)
        del self._prefilled[session.id], self._slots[session.id]
        held = min(self._kv.length(session.slot), session.base) if keep and self._config.prefix_reuse else 0
        if held:
            tenant, salt = self._kv.tenant(session.slot), session.request.cache_salt
            self._prefixes.keep(session.slot, tenant, session.tokens[:held], salt)
        self._kv.free(session.slot, keep=held)
        session.vacate(phase)
        self._drafting.end(session, last)

    def _account(self, mode: str, shape: Shape, spent: RoundSpent, outcomes: Sequence[Outcome]) -> None:
        times = self.times
        times.draft += spent.draft
        times.forward += spent.forward
        times.accept += spent.accept
        times.other += spent.total - spent.draft - spent.forward - spent.accept
        times.steps += 1
        self.study_time.earn(spent.total)
        decoded = [outcome for outcome in outcomes if outcome.item is not None]
        tokens = sum(len(outcome.item.token_ids) for outcome in decoded if outcome.item)
        chosen = self._drafting.measurable and any(outcome.session.speculation.engine_chooses for outcome in decoded)
        self.governor.observe(mode if chosen else MIXED, shape, tokens, spent)
        speeds = self.governor.modes
        named = ", ".join(f"{name} {speeds.speed(name):.2f}" for name in speeds.steps)
        self.last_choice = f"{mode} drafting for {len(outcomes)} sessions (tokens per plain step: {named})"


def _verify(session: Session, tree: TokenTree, lead: Sequence[int] = ()) -> Verify:
    root, stop_ids = session.tokens[-1], session.stop_ids
    return Verify(session.slot, root, tree, session.params, session.history, session.base, stop_ids, lead)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)

"""Draft workers in virtual time, and how targets reach them: leases, one call at a time, hops, deaths and hangs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.simulation.prices import DraftPrice
from benchmarks.simulation.trace_drafter import TraceDrafter
from benchmarks.simulation.traces import Trace
from benchmarks.simulation.virtual_time import EventLoop
from cluster.core.types import Origin
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.messages import DraftAsk, DraftReply


@dataclass(slots=True)
class Call:
    """One call on its way: ``done`` gets the reply, ``lost`` is told where the worker died."""

    verifier: str
    asks: Sequence[DraftAsk]
    upstream: DraftReply | None
    done: Callable[[DraftReply], None]
    lost: Callable[[], None]


class SimulatedWorker:
    """The real ``DraftWorker`` on a machine of its own, which computes one call after the other."""

    def __init__(self, loop: EventLoop, stage: str, trace: Trace, price: DraftPrice) -> None:
        self.leases = 0
        self.busy_s = 0.0
        self.calls = 0
        self.gone = False  # for good
        self._loop = loop
        self._stage = stage
        self._trace = trace
        self._price = price
        self._queue: deque[Call] = deque()
        self._computing: Call | None = None
        self._up_at = self._hangs_until = 0.0
        self._newest: dict[tuple[str, str], tuple[int, int]] = {}
        self._worker = self._start()

    @property
    def up(self) -> bool:
        return not self.gone and self._loop.now >= self._up_at

    def call(self, call: Call) -> None:
        """A call arrives."""
        if not self.up:
            call.lost()
            return
        for ask in call.asks:
            name = (call.verifier, ask.commit.key.session_id)
            self._newest[name] = max(_state(ask), self._newest.get(name, (0, 0)))
        self._queue.append(call)
        self._next()

    def end(self, verifier: str, session_id: str) -> None:
        self._newest.pop((verifier, session_id), None)
        self._worker.end(verifier, session_id)

    def die(self, seconds: float | None) -> None:
        """Lose everything, calls under way included; be there again, empty, after ``seconds``, or never."""
        self.gone = seconds is None
        self._up_at = self._loop.now + (seconds or 0.0)
        lost = [call for call in (self._computing, *self._queue) if call is not None]
        self._computing = None
        self._queue.clear()
        self._worker = self._start()
        for call in lost:
            call.lost()

    def hang(self, seconds: float) -> None:
        """Answer nothing for ``seconds``."""
        self._hangs_until = self._loop.now + seconds

    def _start(self) -> DraftWorker:
        drafter = TraceDrafter(self._trace, Origin[self._stage.upper()])
        return DraftWorker(self._stage, drafter, clock=self._loop.clock)

    def _next(self) -> None:
        if self._computing is not None or not self._queue:
            return
        call = self._computing = self._queue.popleft()
        # An ask that a newer one of its session has overtaken is dropped, as by the real worker's actor.
        call.asks = [ask for ask in call.asks if _state(ask) >= self._newest.get(_name(call, ask), (0, 0))]
        seconds = self._price.seconds(sum(ask.max_nodes > 0 for ask in call.asks), self._unread(call))
        self.busy_s += seconds
        self.calls += 1
        self._loop.after(seconds, lambda: self._answer(call))

    def _answer(self, call: Call) -> None:
        if self._computing is not call:
            return
        if self._loop.now < self._hangs_until:
            self._loop.at(self._hangs_until, lambda: self._answer(call))
            return
        self._computing = None
        call.done(self._worker.draft(call.verifier, call.asks, call.upstream))
        self._next()

    def _unread(self, call: Call) -> int:
        return sum(len(ask.start.token_ids) if ask.start else len(ask.commit.token_ids) for ask in call.asks)


class Pool:
    """The workers of one stage, shared by all targets. The one with the fewest leases gets the next session."""

    def __init__(self, stage: str, workers: Sequence[SimulatedWorker], max_sessions: int) -> None:
        self.stage = stage
        self.workers = tuple(workers)
        self._max_sessions = max_sessions

    def lease(self) -> SimulatedWorker | None:
        """None where no worker has room."""
        free = [worker for worker in self.workers if worker.up and worker.leases < self._max_sessions]
        worker = min(free, key=lambda worker: worker.leases, default=None)
        if worker is not None:
            worker.leases += 1
        return worker

    def release(self, worker: SimulatedWorker) -> None:
        worker.leases -= 1


def _state(ask: DraftAsk) -> tuple[int, int]:
    return ask.commit.key.epoch, ask.commit.key.base


def _name(call: Call, ask: DraftAsk) -> tuple[str, str]:
    return call.verifier, ask.commit.key.session_id

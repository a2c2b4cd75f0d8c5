"""``DraftTransport`` in virtual time: what ``cluster.leases`` does over Ray, over a network of given latency."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from benchmarks.simulation.pool import Call, Pool, SimulatedWorker
from benchmarks.simulation.virtual_time import EventLoop
from cluster.rounds.messages import DraftAsk, DraftReply
from cluster.rounds.pipeline import ChainAsk, Deliver, Fail

REOPEN_AFTER_S = 1.0  # as ``cluster.leases``, which cannot be imported without Ray


class SimulatedTransport:
    """One target's way to the pools. A hop takes ``hop_s`` (median; ``jitter`` is the deviation of its log)."""

    def __init__(
        self,
        loop: EventLoop,
        verifier: str,
        pools: Mapping[str, Pool],
        hop_s: float,
        jitter: float,
        lease_s: float,
        seed: int,
    ) -> None:
        self._loop = loop
        self._verifier = verifier
        self._pools = pools
        self._hop_s, self._jitter, self._lease_s = hop_s, jitter, lease_s
        self._random = np.random.default_rng(seed)
        self._workers: dict[tuple[str, str], SimulatedWorker] = {}
        self._open: set[tuple[str, str]] = set()
        self._opening: list[tuple[str, str]] = []

    def open(self, session_id: str, stages: Sequence[str]) -> None:
        missing = [(session_id, stage) for stage in stages if (session_id, stage) not in self._open]
        if missing and not self._opening:
            self._loop.after(self._lease_s, self._lease_all)
        self._opening += missing
        self._open |= set(missing)

    def worker(self, session_id: str, stage: str) -> SimulatedWorker | None:
        worker = self._workers.get((session_id, stage))
        return None if worker is None or worker.gone else worker

    def draft(self, chains: Sequence[ChainAsk], deliver: Deliver, fail: Fail) -> None:
        groups: dict[tuple[SimulatedWorker, ...], list[ChainAsk]] = defaultdict(list)
        for chain in chains:
            lost = next((stage for stage in chain.asks if self.worker(chain.session_id, stage) is None), None)
            if lost is not None:
                fail(lost, None, [chain.session_id])
            else:
                groups[tuple(self._workers[chain.session_id, stage] for stage in chain.asks)].append(chain)
        for workers, members in groups.items():
            self._call(iter(list(zip(members[0].asks, workers))), members, None, deliver, fail)

    def leases(self) -> dict[str, int]:
        counts = dict.fromkeys(self._pools, 0)
        for _, stage in self._workers:
            counts[stage] += 1
        return counts

    def close(self, session_id: str) -> None:
        for stage in self._pools:
            self._open.discard((session_id, stage))
            worker = self._workers.pop((session_id, stage), None)
            if worker is not None:
                self._let_go(session_id, stage, worker)

    def stop(self) -> None:
        """Nothing runs beside the simulation."""

    def drop(self, worker: SimulatedWorker) -> None:
        """The worker is gone for good: its sessions get others."""
        for place in [place for place, other in self._workers.items() if other is worker]:
            del self._workers[place]
            self._pools[place[1]].release(worker)
            self._loop.after(REOPEN_AFTER_S, lambda place=place: self._lease(*place))  # type: ignore[misc]

    def _lease_all(self) -> None:
        """In the order of sessions, not of the set they came from."""
        wanted, self._opening = self._opening, []
        for session_id, stage in sorted(wanted, key=lambda place: int(place[0].rpartition("#")[2])):
            self._lease(session_id, stage)

    def _lease(self, session_id: str, stage: str) -> None:
        if (session_id, stage) not in self._open:
            return
        worker = self._pools[stage].lease()
        if worker is None:
            self._loop.after(REOPEN_AFTER_S, lambda: self._lease(session_id, stage))
        else:
            self._workers[session_id, stage] = worker

    def _let_go(self, session_id: str, stage: str, worker: SimulatedWorker) -> None:
        self._pools[stage].release(worker)
        self._loop.after(self._hop(), lambda: worker.end(self._verifier, session_id))

    def _call(
        self,
        rest: Iterator[tuple[str, SimulatedWorker]],
        members: Sequence[ChainAsk],
        upstream: DraftReply | None,
        deliver: Deliver,
        fail: Fail,
    ) -> None:
        """The chain's next call: each stage's answer goes on to the next stage, and to the target."""
        stage, worker = next(rest, (None, None))
        if stage is None or worker is None:
            return
        asks: list[DraftAsk] = [chain.asks[stage] for chain in members]

        def done(reply: DraftReply) -> None:
            self._loop.after(self._hop(), lambda: deliver(worker, reply))
            self._call(rest, members, reply, deliver, fail)

        def lost() -> None:
            self._loop.after(self._hop(), lambda: fail(stage, worker, [chain.session_id for chain in members]))

        call = Call(self._verifier, asks, upstream, done, lost)
        self._loop.after(self._hop(), lambda: worker.call(call))

    def _hop(self) -> float:
        return self._hop_s * float(np.exp(self._jitter * self._random.standard_normal())) if self._hop_s else 0.0

"""Runs a deployment in virtual time: arrivals, faults, and what came of every request."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from benchmarks.simulation.deployment import Deployment, FaultConfig, TraceConfig
from benchmarks.simulation.pool import Pool, SimulatedWorker
from benchmarks.simulation.target import SimulatedTarget, request
from benchmarks.simulation.traces import Trace
from benchmarks.simulation.transport import SimulatedTransport
from benchmarks.simulation.virtual_time import EventLoop
from cluster.core.errors import Overloaded
from cluster.rounds.session import Session

LONGEST_S = 1e6  # of simulated time; a deployment that takes longer does not come to an end


@dataclass(slots=True)
class Served:
    """One request's life. ``items``: when each of its items came, and with how many tokens."""

    target: str
    output_tokens: int
    arrived_s: float
    items: list[tuple[float, int]] = field(default_factory=list)
    finished: bool = False
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.items)


@dataclass(slots=True)
class Replay:
    """What came of a deployment; ``results.figures`` says it in numbers."""

    deployment: Deployment
    seconds: float
    served: list[Served]
    refused: int
    targets: list[SimulatedTarget]
    pools: dict[str, Pool]


class Run:
    """One replay under way."""

    def __init__(self, deployment: Deployment, traces: Callable[[TraceConfig], Trace]) -> None:
        self.deployment = deployment
        self.loop = EventLoop()
        self.served: dict[str, Served] = {}
        self.refused = 0
        self._open = 0
        self._numbers = itertools.count()
        self._seeds = np.random.SeedSequence(deployment.seed)
        self.pools = {
            stage.name: Pool(
                stage.name,
                [
                    SimulatedWorker(self.loop, stage.name, traces(stage.trace), stage.price())
                    for _ in range(stage.workers)
                ],
                stage.max_sessions,
            )
            for stage in deployment.stages
        }
        self.transports: list[SimulatedTransport] = []
        self.targets = [self._target(number, traces) for number in range(deployment.target.replicas)]
        self._pending = {target.name: deployment.workload.requests for target in self.targets}

    def _target(self, number: int, traces: Callable[[TraceConfig], Trace]) -> SimulatedTarget:
        deployment, name = self.deployment, f"target-{number}"
        network, local = deployment.network, deployment.local_drafter
        remote = None
        if self.pools:
            transport = SimulatedTransport(
                self.loop, name, self.pools, network.hop_s, network.jitter, network.lease_s, self._seed()
            )
            self.transports.append(transport)
            remote = (transport, tuple(self.pools))
        return SimulatedTarget(
            self.loop,
            name,
            deployment.target.engine,
            deployment.target.price(),
            self._emitted,
            None if local is None else (traces(local.trace), local.price()),
            remote,
            self._seed(),
        )

    def _seed(self) -> int:
        return int(self._seeds.spawn(1)[0].generate_state(1)[0])

    def run(self) -> Replay:
        workload = self.deployment.workload
        for fault in self.deployment.faults:
            self.loop.at(fault.at_s, partial(self._strike, fault))
        for target in self.targets:
            if workload.sessions is not None:
                for _ in range(min(workload.sessions, workload.requests)):
                    self._submit(target)
            else:
                self._arrive_at_random(target)
        try:
            self.loop.run(self._over)
        finally:
            for target in self.targets:
                target.stop()
        return Replay(
            self.deployment, self.loop.now, list(self.served.values()), self.refused, self.targets, self.pools
        )

    def _over(self) -> bool:
        if self.loop.now > LONGEST_S:
            raise RuntimeError(f"the deployment is not done after {LONGEST_S:g} simulated seconds")
        return not self._open and not any(self._pending.values())

    def _arrive_at_random(self, target: SimulatedTarget) -> None:
        random = np.random.default_rng(self._seed())
        rate = self.deployment.workload.rate
        assert rate is not None
        for time_s in np.cumsum(random.exponential(1.0 / rate, self._pending[target.name])).tolist():
            self.loop.at(time_s, partial(self._submit, target))

    def _submit(self, target: SimulatedTarget) -> None:
        workload, number = self.deployment.workload, next(self._numbers)
        self._pending[target.name] -= 1
        prompt = workload.prompt_tokens[number % len(workload.prompt_tokens)]
        output = workload.output_tokens[number % len(workload.output_tokens)]
        name = f"r{number}"
        try:
            target.submit(request(name, self.deployment.seed + number, prompt, output))
        except Overloaded:
            self.refused += 1
            return
        self.served[name] = Served(target.name, output, self.loop.now)
        self._open += 1

    def _emitted(self, session: Session, tokens: int, last: bool) -> None:
        served = self.served[session.request.request_id]
        served.items.append((self.loop.now, tokens))
        if last:
            stats = session.stats
            served.rounds, served.drafted, served.accepted = stats.rounds, stats.drafted, stats.accepted
            served.finished = True
            self._open -= 1
            if self.deployment.workload.sessions is not None:
                target = next(target for target in self.targets if target.name == served.target)
                if self._pending[target.name]:
                    self._submit(target)

    def _strike(self, fault: FaultConfig) -> None:
        worker = self.pools[fault.stage].workers[fault.worker]
        if fault.kind == "hang":
            assert fault.for_s is not None
            worker.hang(fault.for_s)
            return
        worker.die(fault.for_s)
        if worker.gone:
            for transport in self.transports:
                transport.drop(worker)


def replay(deployment: Deployment, known: Mapping[TraceConfig, Trace] | None = None) -> Replay:
    """Serve the whole workload. ``known``: traces by their configuration, where they are in memory already.

    Raises ``ConfigError`` for files that are not what they should be.
    """
    traces = dict(known or {})

    def trace_of(config: TraceConfig) -> Trace:
        if config not in traces:
            traces[config] = config.trace(deployment.seed)
        return traces[config]

    return Run(deployment, trace_of).run()

"""Plain classes get their Ray shells here: draft workers and tensor-parallel ranks become actors, an engine finds its
drafters by lease.

The only module with ``ray.remote``. Heavy imports stand inside: a Draft replica and an SSSD worker never run a model.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.core.config import DraftersConfig, ModelConfig, ServiceConfig, StageConfig
from cluster.core.errors import EngineDied, EngineFailed
from cluster.core.logs import show_logs_in_actor
from cluster.core.types import tokenizer_hash
from cluster.leases import RayDraftTransport
from cluster.placement import rank_resources
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.messages import PROTOCOL_VERSION, DraftAsk, WorkerFacts, WorkerLoad, pack, unpack
from drafters import TargetFacts, create, reads_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.engine.tensor_parallel import RankPlan, Recruiter
    from cluster.tree_engine import TreeEngine
    from cluster.vllm_engine import VllmEngine

log = logging.getLogger(__name__)

HOLD_POLL_S = 0.5
CONTROL_CALLS = 1000  # of a draft worker at once, beside a held lease and a call for each of its sessions
COMPUTE_LIMIT_S = 60.0  # a draft computation that takes longer is stuck
STOP_LIMIT_S = 5.0  # for ranks to end after they were told to


class DraftActor:
    """A draft worker as an async actor with one compute thread: a call that waits never holds another up."""

    def __init__(self, stage: StageConfig, config: DraftersConfig) -> None:
        from cluster.engine.weights import load_tokenizer, read_config, resolve_model

        show_logs_in_actor()
        folder = resolve_model(config.target_model.source, log.info, weights=reads_target(stage))
        facts = TargetFacts(read_config(folder).vocab_size, config.max_model_len, folder, config.target_model.dtype)
        self._crews: list[RayCrew] = []
        recruiter = _recruiter(stage.model, self._crews) if stage.model and stage.num_ranks > 1 else None
        self._worker = DraftWorker(stage.name, create(stage, target=facts, recruiter=recruiter), stage.lease_ttl_s)
        self._facts = WorkerFacts(
            stage.name, os.getpid(), PROTOCOL_VERSION, tokenizer_hash(load_tokenizer(folder).get_vocab())
        )
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draft")
        self._newest: dict[tuple[str, str], tuple[int, int]] = {}
        self._computing_since: float | None = None
        self._work = WorkerLoad(0.0, 0, 0)

    async def load(self) -> WorkerLoad:
        return self._work

    async def facts(self) -> WorkerFacts:
        return self._facts

    async def check(self) -> None:
        """Called every few seconds. Raises ``EngineFailed`` where the compute thread is stuck.

        Frees idle sessions, too: with nobody asking any more no call of ``draft`` would.
        """
        since = self._computing_since
        if since is not None and time.monotonic() - since > COMPUTE_LIMIT_S:
            raise EngineFailed(f"a draft computation has been running for {time.monotonic() - since:.0f} s")
        self._compute.submit(self._look_after)  # not waited for: drafts may stand before it

    def _look_after(self) -> None:
        for crew in self._crews:
            if reason := crew.failure():
                self._end(reason)
        self._worker.drop_idle()

    def _end(self, reason: object) -> None:
        """Of this process, for good: Ray restarts it under the same handle."""
        log.critical("%s: this worker ends, and its successor begins with new ranks", reason)
        os._exit(1)

    async def draft(self, verifier: str, packed: bytes, upstream: bytes | None = None) -> bytes:
        """See ``DraftWorker.draft``. ``upstream`` arrives as the small stage's object ref, resolved by Ray.

        An ask that a newer one of its session has overtaken while it queued is dropped: its tree would be late.
        """
        asks: list[DraftAsk] = unpack(packed)
        states = [(ask, (verifier, ask.commit.key.session_id), _state(ask)) for ask in asks]
        for _, name, state in states:
            self._newest[name] = max(state, self._newest.get(name, state))

        def compute() -> bytes:
            self._computing_since = start = time.monotonic()
            try:
                fresh = [ask for ask, name, state in states if state >= self._newest.get(name, state)]
                return pack(self._worker.draft(verifier, fresh, None if upstream is None else unpack(upstream)))
            except EngineDied as error:
                self._end(error)
                raise
            finally:
                self._computing_since = None
                self._work = self._work.plus(time.monotonic() - start, len(asks), len(asks) - len(fresh))

        try:
            return await asyncio.get_running_loop().run_in_executor(self._compute, compute)
        finally:
            for _, name, state in states:
                if self._newest.get(name) == state:  # nothing newer is on its way
                    del self._newest[name]

    async def hold(self, verifier: str, session_id: str, ttl_s: float) -> None:
        """Return once the session has not been asked about for ``ttl_s`` seconds."""
        unseen = 0.0
        while True:
            idle = self._worker.idle_seconds(verifier, session_id)
            unseen = unseen + HOLD_POLL_S if idle is None else idle
            if unseen > ttl_s:
                return
            await asyncio.sleep(HOLD_POLL_S)

    async def release(self, verifier: str, session_id: str) -> None:
        """Free the session, after whatever is still queued for it."""
        await asyncio.get_running_loop().run_in_executor(self._compute, self._worker.end, verifier, session_id)

    async def num_sessions(self) -> int:
        return self._worker.num_sessions


def _state(ask: DraftAsk) -> tuple[int, int]:
    return ask.commit.key.epoch, ask.commit.key.base


def start_draft_worker(stage: StageConfig, config: DraftersConfig) -> tuple[Any, WorkerFacts]:
    """A new draft worker actor and its facts; returns once it is ready, raises what its constructor raises.

    Ray restarts it where its process dies, and its handle stays good.
    """
    concurrency = CONTROL_CALLS + 2 * stage.max_sessions
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0, "max_concurrency": concurrency}
    if stage.num_ranks > 1:  # the group's other bundles are for the other ranks
        group = ray.util.get_current_placement_group()
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    worker = ray.remote(DraftActor).options(**{**options, **stage.actor_options}).remote(stage, config)
    return worker, ray.get(worker.facts.remote())


class RankActor:
    """Ranks 1, 2, ... of a model: all of a rank's life is one call of ``run``, whose ref tells of its death."""

    def pid(self) -> int:
        return os.getpid()

    def run(self, plan: RankPlan, source: str) -> None:
        """``source``: of the model, which this node may keep elsewhere than rank 0's."""
        from cluster.engine.tensor_parallel import follow
        from cluster.engine.weights import resolve_model

        show_logs_in_actor()
        follow(replace(plan, folder=resolve_model(source, log.info)))


class RayCrew:
    """A ``Crew`` of actors, each in its own bundle of rank 0's placement group, if it has one."""

    def __init__(self, source: str, plans: Sequence[RankPlan]) -> None:
        group = ray.util.get_current_placement_group()
        actors = {f"rank {plan.shard.rank}": _start_rank(plan, group) for plan in plans}
        self.pids: dict[str, int] = dict(zip(actors, ray.get([actor.pid.remote() for actor in actors.values()])))
        self._actors = list(actors.values())
        self._runs = {actor.run.remote(plan, source): name for (name, actor), plan in zip(actors.items(), plans)}

    def failure(self) -> str:
        ended, _ = ray.wait(list(self._runs), num_returns=len(self._runs), timeout=0)
        return "; ".join(f"{self._runs[run]} (pid {self.pids[self._runs[run]]}) {_end_of(run)}" for run in ended)

    def close(self) -> None:
        ray.wait(list(self._runs), num_returns=len(self._runs), timeout=STOP_LIMIT_S)
        for actor in self._actors:
            ray.kill(actor)


def _start_rank(plan: RankPlan, group: Any) -> Any:
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0}
    if group is not None:
        index = plan.shard.rank
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        options |= rank_resources(group.bundle_specs[index]) | {"scheduling_strategy": strategy}
    threads = {"OMP_NUM_THREADS": str(plan.threads)}
    return ray.remote(RankActor).options(**options, runtime_env={"env_vars": threads}).remote()


def _end_of(run: Any) -> str:
    try:
        ray.get(run)
    except Exception as error:
        return f"died: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    return "has stopped"


def _recruiter(model: ModelConfig, crews: list[RayCrew]) -> Recruiter:
    """Of the actors that are ``model``'s other ranks, which reach this process over the network only if its placement
    group has several nodes. Who was recruited is added to ``crews``."""
    from cluster.engine.collectives import LOOPBACK
    from cluster.engine.tensor_parallel import Recruiter

    group = ray.util.get_current_placement_group()
    nodes = set(ray.util.placement_group_table(group)["bundles_to_node_id"].values()) if group is not None else set()
    host = str(ray.util.get_node_ip_address()) if len(nodes) > 1 else LOOPBACK

    def recruit(plans: Sequence[RankPlan]) -> RayCrew:
        crews.append(RayCrew(model.source, plans))
        return crews[-1]

    return Recruiter(recruit, host)


def launch_engine(config: ServiceConfig) -> TreeEngine:
    """The engine of a Target replica: its other ranks are actors, its drafters are reached by leases on the
    application ``config.drafters_app``."""
    from cluster.assemble import build_engine

    verifier = uuid.uuid4().hex[:12]  # a restarted replica is another verifier: it shares no session with its past
    return build_engine(
        config,
        lambda info: RayDraftTransport(verifier, config.drafters_app, config.remote_stages, info.tokenizer_hash),
        recruiter=_recruiter(config.model, []),
    )


def launch_vllm(config: ServiceConfig) -> VllmEngine:
    """vLLM in a Target replica. Its own processes reach the drafters; this one only tells them where."""
    from cluster.vllm_engine import VllmEngine

    if not config.remote_stages:
        return VllmEngine(config)
    return VllmEngine(config, f"{ray.get_runtime_context().gcs_address}/{config.drafters_app}")

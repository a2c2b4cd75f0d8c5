"""Serve deployment of one draft stage: a replica owns one draft worker and leases it to sessions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import ActorDiedError, RayActorError

from cluster.core.config import DraftersConfig, StageConfig
from cluster.core.logs import show_logs_in_replica
from cluster.launch import start_draft_worker
from cluster.rounds.messages import Lease, WorkerLoad
from deployments.autoscaling import BUSY, OVERTAKEN

log = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 20.0
WORKER_RESTART_POLL_S = 0.5


class Draft:
    """Leases. The number of open leases is the number of sessions, which is what Serve balances and scales by."""

    def __init__(self, stage: StageConfig, config: DraftersConfig) -> None:
        show_logs_in_replica()
        self._stage = stage
        self._worker, self._facts = start_draft_worker(stage, config)
        self._reported, self._reported_s = WorkerLoad(0.0, 0, 0), time.monotonic()

    async def open(self, verifier: str, session_id: str) -> AsyncIterator[Lease]:
        """Lease the worker to a session: one item, then silence until the session is idle for ``lease_ttl_s``.

        The verifier ends a lease by closing the stream. A worker whose process died is restarted by Ray under the same
        handle, so the lease outlives it.
        """
        try:
            yield Lease(self._worker, self._facts)
            while True:
                try:
                    await self._worker.hold.remote(verifier, session_id, self._stage.lease_ttl_s)
                    return
                except RayActorError:
                    await asyncio.sleep(WORKER_RESTART_POLL_S)
        finally:
            self._worker.release.remote(verifier, session_id)

    async def num_sessions(self) -> int:
        """Sessions the worker holds now; for tests and status."""
        return int(await self._worker.num_sessions.remote())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve. What the worker did since the last call, as shares: see ``deployments.autoscaling``."""
        try:
            load: WorkerLoad = await self._worker.load.remote()
        except RayActorError:
            load = WorkerLoad(0.0, 0, 0)  # being restarted
        before, self._reported = self._reported, load
        start, self._reported_s = self._reported_s, time.monotonic()
        asks = max(1, load.asks - before.asks)
        return {
            BUSY: max(0.0, load.busy_s - before.busy_s) / max(1e-3, self._reported_s - start),
            OVERTAKEN: max(0, load.overtaken - before.overtaken) / asks,
        }

    async def check_health(self) -> None:
        """Unhealthy where the worker is stuck, or gone for good; a replica's successor has a worker of its own."""
        try:
            await asyncio.wait_for(self._worker.check.remote(), HEALTH_TIMEOUT_S)
        except ActorDiedError:
            raise
        except RayActorError:
            log.warning("the draft worker of stage %s is being restarted", self._stage.name)


class Drafters:
    """Root of the drafters' application: Serve wants one; it only ties the stages together."""

    def __init__(self, stages: dict[str, Any]) -> None:
        self._stages = stages

    async def sessions(self) -> dict[str, int]:
        """Sessions held by each stage's worker (of one replica, where a stage has several)."""
        return {name: await handle.num_sessions.remote() for name, handle in self._stages.items()}

"""Plain classes get their Ray shells here: draft workers become actors, an engine finds its drafters by lease.

The only module with ``ray.remote``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from cluster.assemble import build_engine
from cluster.core.config import DraftersConfig, ServiceConfig, StageConfig
from cluster.core.types import tokenizer_hash
from cluster.engine.weights import load_tokenizer, read_config, resolve_model
from cluster.leases import RayDraftTransport
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.messages import PROTOCOL_VERSION, DraftAsk, DraftReply, WorkerFacts
from cluster.tree_engine import TreeEngine
from drafters import TargetFacts, create

log = logging.getLogger(__name__)

HOLD_POLL_S = 0.5
MAX_CONCURRENT_CALLS = 1000


class DraftActor:
    """A draft worker as an async actor with one compute thread: a call that waits never holds another up."""

    def __init__(self, stage: StageConfig, config: DraftersConfig) -> None:
        folder = resolve_model(config.target_model.source, log.info)
        facts = TargetFacts(read_config(folder).vocab_size, config.max_model_len, folder, config.target_model.dtype)
        self._worker = DraftWorker(stage.name, create(stage, target=facts))
        self._facts = WorkerFacts(
            stage.name, os.getpid(), PROTOCOL_VERSION, tokenizer_hash(load_tokenizer(folder).get_vocab())
        )
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draft")
        self._newest: dict[tuple[str, str], int] = {}

    async def facts(self) -> WorkerFacts:
        return self._facts

    async def draft(self, verifier: str, asks: list[DraftAsk], upstream: DraftReply | None = None) -> DraftReply:
        """See ``DraftWorker.draft``. ``upstream`` arrives as the small stage's object ref, resolved by Ray.

        An ask that a newer one of its session has overtaken while it queued is dropped: its tree would be late.
        """
        for ask in asks:
            name = (verifier, ask.commit.key.session_id)
            self._newest[name] = max(ask.commit.key.base, self._newest.get(name, 0))

        def compute() -> DraftReply:
            fresh = [
                ask for ask in asks if ask.commit.key.base >= self._newest.get((verifier, ask.commit.key.session_id), 0)
            ]
            return self._worker.draft(verifier, fresh, upstream)

        return await asyncio.get_running_loop().run_in_executor(self._compute, compute)

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
        self._newest.pop((verifier, session_id), None)
        await asyncio.get_running_loop().run_in_executor(self._compute, self._worker.end, verifier, session_id)

    async def num_sessions(self) -> int:
        return self._worker.num_sessions


def start_draft_worker(stage: StageConfig, config: DraftersConfig) -> Any:
    """A new draft worker actor; Ray restarts it where its process dies, and its handle stays good."""
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0, "max_concurrency": MAX_CONCURRENT_CALLS}
    return ray.remote(DraftActor).options(**{**options, **stage.actor_options}).remote(stage, config)


def launch_engine(config: ServiceConfig) -> TreeEngine:
    """The engine of a Target replica, drafting through leases on the application ``config.drafters_app``."""
    verifier = uuid.uuid4().hex[:12]  # a restarted replica is another verifier: it shares no session with its past
    return build_engine(
        config,
        lambda info: RayDraftTransport(verifier, config.drafters_app, config.remote_stages, info.tokenizer_hash),
    )

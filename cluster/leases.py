"""``RayDraftTransport``: asks travel as plain actor calls, and a stage's answer as an object ref into the next stage.

Control plane: a lease per session and stage is one long streaming Serve call, so that Serve balances, wakes, drains and
scales drafters by their number of sessions. Data plane: calls on the leased worker's own actor handle.
Leases live on an event loop in a thread of its own; the engine thread never waits for anything here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ray import serve

from cluster.core.errors import ConfigError
from cluster.core.types import STAGE_NAMES
from cluster.rounds.messages import PROTOCOL_VERSION, Lease, pack, unpack
from cluster.rounds.pipeline import ChainAsk, Deliver, Fail

log = logging.getLogger(__name__)

REOPEN_AFTER_S = 1.0
MISSING_FOR_S = 30.0
REFUSED_FOR_S = 60.0  # until it is looked whether a stage that fitted no longer, or not yet, has been replaced
STOP_LIMIT_S = 10.0


def deployment_name(stage: str) -> str:
    """Name of a stage's ``Draft`` deployment."""
    return f"Draft-{stage}"


def draft_stages(app: str) -> list[str]:
    """Stages that the application has, in chain order; none where there is no such application."""
    status = serve.status().applications.get(app)
    return [stage for stage in STAGE_NAMES if status is not None and deployment_name(stage) in status.deployments]


class RayDraftTransport:
    """Implements ``DraftTransport`` over leases from the ``Draft`` deployments of the application ``app``.

    in_background: whether calls are sent on the transport's own thread. That delays them by its waking and takes half
    a millisecond off the caller: right for whoever does not wait for the answers.
    """

    def __init__(
        self, verifier: str, app: str, stages: Sequence[str], tokenizer_hash: str, *, in_background: bool = False
    ) -> None:
        self._verifier = verifier
        self._app = app
        self._stages = tuple(stages)
        self._tokenizer_hash = tokenizer_hash
        self._in_background = in_background
        self._workers: dict[tuple[str, str], Any] = {}  # (session, stage) -> actor handle
        self._tasks: dict[str, dict[str, asyncio.Task[None]]] = {}  # by session and stage
        self._refused_until: dict[str, float] = {}  # stages that are another model's
        self._missing_since: dict[str, float] = {}  # stages that gave no lease when last asked
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="draft-transport", daemon=True)
        self._thread.start()

    # --- called by the engine thread; nothing here blocks

    def open(self, session_id: str, stages: Sequence[str]) -> None:
        self._loop.call_soon_threadsafe(self._open, session_id, tuple(stages))

    def worker(self, session_id: str, stage: str) -> Hashable:
        return self._workers.get((session_id, stage))

    def close(self, session_id: str) -> None:
        self._loop.call_soon_threadsafe(self._close, session_id)

    def leases(self) -> dict[str, int]:
        counts = dict.fromkeys(self._stages, 0)
        for _, stage in list(self._workers):
            counts[stage] += 1
        return counts

    def stop(self) -> None:
        """Give every lease back and end the thread."""

        async def drain() -> None:
            tasks = [task for tasks in self._tasks.values() for task in tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        try:
            asyncio.run_coroutine_threadsafe(drain(), self._loop).result(timeout=STOP_LIMIT_S)
        except TimeoutError:
            log.warning("leases were not given back within %g s", STOP_LIMIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=STOP_LIMIT_S)

    # --- on the transport's loop

    def _open(self, session_id: str, stages: Sequence[str]) -> None:
        tasks = self._tasks.setdefault(session_id, {})
        for stage in stages:
            if not self._refused(stage) and (stage not in tasks or tasks[stage].done()):
                tasks[stage] = self._loop.create_task(self._keep_lease(session_id, stage))

    def _close(self, session_id: str) -> None:
        for task in self._tasks.pop(session_id, {}).values():
            task.cancel()

    def _refused(self, stage: str) -> bool:
        return self._loop.time() < self._refused_until.get(stage, 0.0)

    async def _keep_lease(self, session_id: str, stage: str) -> None:
        """Hold a lease until the session is closed or its ttl is over; open another where it breaks off."""
        while True:
            try:
                await self._lease_once(session_id, stage)
                return
            except ConfigError as error:
                if not self._refused(stage):
                    log.error("stage %s is not used: %s", stage, error)
                self._refused_until[stage] = self._loop.time() + REFUSED_FOR_S
                return
            except Exception as error:  # no such deployment yet, replica gone, ...: drafters may come later
                self._say_missing(stage, error)
            finally:
                self._workers.pop((session_id, stage), None)
            await asyncio.sleep(REOPEN_AFTER_S)

    def _say_missing(self, stage: str, error: Exception) -> None:
        """Once a stage has given no lease for a while: a name may be wrong."""
        since = self._missing_since.setdefault(stage, self._loop.time())
        if self._loop.time() - since > MISSING_FOR_S:
            self._missing_since[stage] = math.inf
            where = f"{deployment_name(stage)} of application {self._app!r}"
            log.warning(
                "stage %s: no worker leased in %g s from %s; asking on (%s)", stage, MISSING_FOR_S, where, error
            )

    async def _lease_once(self, session_id: str, stage: str) -> None:
        handle = serve.get_deployment_handle(deployment_name(stage), self._app)
        stream = handle.options(stream=True).open.remote(self._verifier, session_id)
        try:
            async for lease in stream:
                self._check(stage, lease)
                self._workers[session_id, stage] = lease.worker
                self._missing_since.pop(stage, None)
        finally:
            stream.cancel()

    def _check(self, stage: str, lease: Lease) -> None:
        if lease.facts.protocol != PROTOCOL_VERSION:
            raise ConfigError(f"its worker speaks protocol {lease.facts.protocol}, this target {PROTOCOL_VERSION}")
        if lease.facts.tokenizer_hash != self._tokenizer_hash:
            raise ConfigError(
                f"its worker's tokenizer is {lease.facts.tokenizer_hash}, the target's is {self._tokenizer_hash}"
            )

    # --- draft calls: answered on Ray's thread

    def draft(self, chains: Sequence[ChainAsk], deliver: Deliver, fail: Fail) -> None:
        if self._in_background:
            self._loop.call_soon_threadsafe(self._send, chains, deliver, fail)
        else:
            self._send(chains, deliver, fail)

    def _send(self, chains: Sequence[ChainAsk], deliver: Deliver, fail: Fail) -> None:
        """One call per worker: sessions that share the same workers travel together."""
        groups: dict[tuple[tuple[str, Any], ...], list[ChainAsk]] = defaultdict(list)
        for chain in chains:
            workers = tuple((stage, self._workers.get((chain.session_id, stage))) for stage in chain.asks)
            lost = next((stage for stage, worker in workers if worker is None), None)
            if lost is not None:
                fail(lost, None, [chain.session_id])  # its lease ended a moment ago
            else:
                groups[workers].append(chain)
        for workers, members in groups.items():
            self._call(workers, members, deliver, fail)

    def _call(
        self, workers: Sequence[tuple[str, Any]], members: Sequence[ChainAsk], deliver: Deliver, fail: Fail
    ) -> None:
        def failed(stage: str, worker: Hashable, error: BaseException) -> None:
            """Whatever it is, it costs this round's trees and nothing else."""
            log.debug("a draft call to stage %s failed: %r", stage, error)
            fail(stage, worker, [chain.session_id for chain in members])

        calls: deque[_Call] = deque()
        for stage, worker in workers:
            asks = pack([chain.asks[stage] for chain in members])
            # The upstream's ref is an argument: its trees go from worker to worker, nobody waits for them here.
            upstream = [calls[-1].answer] if calls else []
            try:
                calls.append(_Call(stage, worker, worker.draft.remote(self._verifier, asks, *upstream)))
            except Exception as error:
                failed(stage, worker, error)
                break
        if calls:
            _deliver_in_turn(calls, deliver, failed)


@dataclass(frozen=True, slots=True)
class _Call:
    """``answer``: the object ref of what ``worker`` says for ``stage``."""

    stage: str
    worker: Any
    answer: Any


def _deliver_in_turn(
    calls: deque[_Call], deliver: Deliver, failed: Callable[[str, Hashable, BaseException], None]
) -> None:
    """Each answer as it comes, in chain order; the first call that fails breaks the chain.

    On the thread that Ray reads answers on: handing them to an event loop would cost a thread's waking more.
    """
    call = calls.popleft()

    def answered(future: Future[bytes]) -> None:
        # Raised here, the error would hold this frame and the frame the future: a cycle that keeps refs and asks alive.
        if (broken := future.exception()) is not None:
            failed(call.stage, call.worker, broken)
            return
        try:
            deliver(call.worker, unpack(future.result()))
        except Exception as error:
            failed(call.stage, call.worker, error)
        else:
            if calls:
                _deliver_in_turn(calls, deliver, failed)

    call.answer.future().add_done_callback(answered)

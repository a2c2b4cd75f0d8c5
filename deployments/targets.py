"""The ingress' view of the Target deployment: calls through Serve's handle, typed errors out, health from a cache.

The only door module that knows Ray's and Serve's errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

import grpc
from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.core.errors import Aborted, EngineDied, EngineFailed, EngineUnavailable, Overloaded, PacelineError
from cluster.core.stats import Load
from cluster.core.types import GenerateRequest, ModelInfo, StreamItem

log = logging.getLogger("ray.serve")

REFRESH_S = 1.0
PROBE_TIMEOUT_S = 2.0
BROADCAST_TIMEOUT_S = 5.0


def typed_error(error: BaseException) -> PacelineError:
    """What a failed call to a target means. Errors of ours come back as they were raised there.

    ``EngineUnavailable`` and, where a process died, ``EngineDied``: another target can go on.
    """
    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, PacelineError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded("the service's queue is full", error.retry_after_s or 1.0)
    if isinstance(error, TaskCancelledError):
        return Aborted("the request was cancelled")
    if isinstance(error, RayActorError):
        return EngineDied("the target serving this request died")
    if isinstance(error, RayServeException):
        return EngineUnavailable("no target takes requests now")
    log.error("unexpected error from a target", exc_info=error)
    if isinstance(error, RayError | grpc.RpcError):
        return EngineUnavailable("the target serving this request is out of reach")
    return EngineFailed(f"{type(error).__name__} in the target")


class Targets:
    """All target replicas behind one handle. ``start`` keeps ``info`` and ``serving`` fresh until ``stop``."""

    def __init__(self, handle: DeploymentHandle, model_key: str) -> None:
        """``model_key``: of the doors' own model (``ModelInfo.model_key``); targets of another one, which this one
        replaces or which replaces it, are as good as none."""
        self._handle = handle
        self._model_key = model_key
        # Items travel inline: a third less CPU per item than as object refs.
        self._streaming = handle.options(method_name="generate", stream=True, _by_reference=False)
        self._info: ModelInfo | None = None
        self._serving = False
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def serving(self) -> bool:
        """Whether a target answered at the last refresh."""
        return self._serving

    @property
    def info(self) -> ModelInfo:
        """What targets serve, or served when one last answered. Raises ``EngineUnavailable`` before that."""
        if self._info is None:
            raise EngineUnavailable("no target is serving yet: loading")
        return self._info

    async def wait_for_info(self, timeout_s: float) -> ModelInfo:
        """``info``, once a target has answered. Raises ``EngineUnavailable`` where none does within ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), aclosing(self.watch()) as states:
                async for _ in states:
                    if self._info is not None:
                        break
        return self.info

    @property
    def last_info(self) -> ModelInfo | None:
        """The same, None before a target has answered."""
        return self._info

    def start(self) -> None:
        """Begin to refresh, on the running event loop."""
        self._spawn(self._refresh_forever())

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def watch(self) -> AsyncGenerator[bool, None]:
        """``serving`` now, then at every change."""
        while True:
            changed = self._changed
            yield self._serving
            await changed.wait()

    async def open(self, request: GenerateRequest) -> AsyncGenerator[StreamItem, None]:
        """One attempt on one target. Raises errors of ``cluster.core.errors`` only."""
        response = self._streaming.remote(request)
        ended = False
        try:
            async for item in response:
                ended = item.finish_reason is not None
                yield item
            if not ended:
                ended = True
                raise EngineFailed("the target's stream ended without a finish reason")
        except Exception as error:
            found = typed_error(error)
            # Out of reach is not dead: left alone, such a target would write to the end for nobody.
            ended = not isinstance(found, EngineUnavailable)
            raise found from None
        finally:
            if not ended:
                # Cancelled, closed, too late or lost. The abort covers a cancellation that Serve delivers late or
                # never; a later attempt, which may have begun by then, is not meant.
                response.cancel()
                self._spawn(self.abort(request.request_id, request.call_id, request.epoch))

    async def probe(self, timeout_s: float) -> None:
        """Return once a target answered. Raises ``EngineUnavailable`` where none did within ``timeout_s``."""
        response = self._handle.info.remote()
        try:
            async with asyncio.timeout(timeout_s):
                info: ModelInfo = await response
        except TimeoutError:
            response.cancel()
            raise EngineUnavailable(f"no target answered within {timeout_s:g} s") from None
        except Exception as error:
            raise typed_error(error) from None
        if info.model_key != self._model_key:
            raise EngineUnavailable(f"the target that answered serves another model, {info.model}")
        self._info = info

    async def abort(self, request_id: str, call_id: str = "", epoch: int | None = None) -> bool:
        """End a request wherever it runs; see ``Engine.abort``. False where no target knew it."""
        return any(await self._broadcast("abort", request_id, call_id, epoch))

    async def loads(self) -> list[tuple[str, Load]]:
        """(replica name, load) of every target that answered."""
        return sorted(await self._broadcast("load"), key=lambda named: named[0])

    async def _broadcast(self, method: str, *args: Any, timeout_s: float = BROADCAST_TIMEOUT_S) -> list[Any]:
        """Results of those targets that answered in time."""
        try:
            response = self._handle.broadcast(method, *args)
            async with asyncio.timeout(timeout_s):
                calls = await response._fetch_replica_results_async()
        except (TimeoutError, DeploymentUnavailableError):
            return []  # there is no target now
        except Exception as error:
            raise typed_error(error) from None
        # Serve's own results_async loses all answers for one that is missing.
        answers = [asyncio.ensure_future(call.get_async()) for call in calls]
        done, late = await asyncio.wait(answers, timeout=timeout_s)
        for answer in late:
            answer.cancel()
        if late:
            log.warning("%d of %d targets did not answer %s in %g s", len(late), len(answers), method, timeout_s)
        return [answer.result() for answer in done if not answer.cancelled() and answer.exception() is None]

    async def _refresh_forever(self) -> None:
        """Serving is who answers for itself, however long the queue before it: not what the router makes of it."""
        while True:
            answers: list[ModelInfo] = []
            try:
                found = await self._broadcast("info", timeout_s=PROBE_TIMEOUT_S)
                answers = [info for info in found if info.model_key == self._model_key]
            except PacelineError:
                pass
            except Exception:  # whatever it is, the door must go on looking
                log.exception("the targets' answers cannot be used")
            if answers:
                self._info = answers[0]
            self._set_serving(bool(answers))
            await asyncio.sleep(REFRESH_S)

    def _set_serving(self, serving: bool) -> None:
        if serving == self._serving:
            return
        self._serving = serving
        self._changed.set()
        self._changed = asyncio.Event()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run in the background; the set keeps the task from being collected.

        In an empty context: Serve would cancel it together with the request it was spawned from.
        """
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

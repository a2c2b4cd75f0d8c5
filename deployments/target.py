"""The Target deployment: one replica is one engine. A thin shell; everything of interest is behind ``Engine``."""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol, cast

from ray import serve

from cluster.core.config import ServiceConfig
from cluster.core.errors import ConfigError, EngineUnavailable, PacelineError
from cluster.core.logs import show_logs_in_replica
from cluster.core.stats import FAILED, Health, Load
from cluster.core.types import Engine, GenerateRequest, ModelInfo, StreamItem

log = logging.getLogger("ray.serve")

LAST_WORDS_S = 0.3  # for the calls in flight to be told
CLOSE_LIMIT_S = 10.0  # for an engine that has failed to take down its ranks


class ClosableEngine(Engine, Protocol):
    """An engine with threads or processes to take down."""

    def close(self) -> None: ...


EngineFactory = Callable[[ServiceConfig], ClosableEngine]


class Target:
    """Exposes an engine to the ingress. ``engine_factory`` is an import path, ``module:function``.

    A path, not a function: only this replica imports the engine and what it needs.
    """

    def __init__(self, config: ServiceConfig, engine_factory: str) -> None:
        show_logs_in_replica()
        self._ending = False
        self._engine = import_factory(engine_factory)(config)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[StreamItem, None]:
        """The engine's items. Cancelling the call closes the engine's iterator, which frees the KV slot."""
        engine = self._engine  # a shutdown takes it away
        items = cast(AsyncGenerator[StreamItem, None], engine.generate(request))
        try:
            async with aclosing(items):
                async for item in items:
                    yield item
        except PacelineError:
            self._end_if_failed(engine)
            raise

    async def abort(self, request_id: str, call_id: str = "", epoch: int | None = None) -> bool:
        return self._engine.abort(request_id, call_id, epoch)

    async def info(self) -> ModelInfo:
        """Raises ``EngineUnavailable`` where the engine cannot serve: an answer means "send me work"."""
        self._check()
        return self._engine.info()

    async def load(self) -> tuple[str, Load]:
        """The replica's name and its load."""
        return serve.get_replica_context().replica_id.unique_id, self._engine.load()

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises, three times in a row, or finds no process."""
        self._check()

    def __del__(self) -> None:
        # Serve calls this on shutdown, and Python once more.
        engine: ClosableEngine | None = self.__dict__.pop("_engine", None)
        if engine is not None:
            engine.close()

    def _check(self) -> None:
        health = self._end_if_failed(self._engine)
        if not health.ok:
            raise EngineUnavailable(f"the engine is {health.phase}: {health.detail}")

    def _end_if_failed(self, engine: ClosableEngine) -> Health:
        """End this process where its engine has failed, which is for good. Until Serve gave the replica up, its router
        would offer it every call first, as one that refuses all has none."""
        health = engine.health()
        if health.phase == FAILED and not self._ending:
            self._ending = True
            log.error("the engine has failed, and its process ends: %s", health.detail)
            threading.Thread(target=_leave, args=(engine,), name="leaving", daemon=True).start()
        return health


def _leave(engine: ClosableEngine) -> None:
    time.sleep(LAST_WORDS_S)
    limit = threading.Timer(CLOSE_LIMIT_S, os._exit, (1,))
    limit.daemon = True
    limit.start()
    engine.close()
    os._exit(1)


def import_factory(path: str) -> EngineFactory:
    """Raises ``ConfigError`` naming the path where nothing can be imported from it."""
    module, _, name = path.partition(":")
    try:
        return cast(EngineFactory, getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"engine factory {path!r} cannot be imported: {error}") from error

"""A target's shell around its engine, without Ray."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from cluster.core.config import ServiceConfig, parse_config
from cluster.core.errors import EngineUnavailable, InvalidArgument, PacelineError
from cluster.core.stats import FAILED, Health
from cluster.core.types import GenerateRequest, SamplingParams
from deployments import target
from deployments.target import Target

CONFIG = parse_config(ServiceConfig, {"model": {"source": "owner/name", "name": "m"}})
REQUEST = GenerateRequest("r", (1, 2), SamplingParams())


class OneError:
    """An engine whose every request ends with ``error``, and whose health is ``state``."""

    def __init__(self, state: Health, error: PacelineError) -> None:
        self.state = state
        self.error = error
        self.closed = 0

    def health(self) -> Health:
        return self.state

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Any, None]:
        raise self.error
        yield

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the process, in place of any."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(target, "show_logs_in_replica", lambda: None)
    monkeypatch.setattr(target, "LAST_WORDS_S", 0.0)
    return codes


def make(monkeypatch: pytest.MonkeyPatch, engine: OneError) -> Target:
    monkeypatch.setattr(sys.modules[__name__], "made", lambda config: engine, raising=False)
    return Target(CONFIG, f"{__name__}:made")


async def call(shell: Target) -> None:
    async for _ in shell.generate(REQUEST):
        pass


def settle() -> None:
    for thread in threading.enumerate():
        if thread.name == "leaving":
            thread.join(10.0)


def test_the_process_of_an_engine_that_has_failed_ends_once_its_calls_are_told(
    monkeypatch: pytest.MonkeyPatch, exits: list[int]
) -> None:
    engine = OneError(Health(FAILED, False, "a step failed"), EngineUnavailable("it has stopped"))
    shell = make(monkeypatch, engine)
    for _ in range(2):
        with pytest.raises(EngineUnavailable, match="it has stopped"):
            asyncio.run(call(shell))
    with pytest.raises(EngineUnavailable, match="a step failed"):
        asyncio.run(shell.check_health())
    settle()
    assert (exits, engine.closed) == ([1], 1)


@pytest.mark.parametrize("state", [Health("serving", True), Health("stopped", False)])
def test_one_that_serves_or_is_being_stopped_does_not(
    monkeypatch: pytest.MonkeyPatch, exits: list[int], state: Health
) -> None:
    engine = OneError(state, InvalidArgument("prompt", "no"))
    shell = make(monkeypatch, engine)
    with pytest.raises(InvalidArgument):
        asyncio.run(call(shell))
    if not state.ok:
        with pytest.raises(EngineUnavailable):
            asyncio.run(shell.info())
    settle()
    assert (exits, engine.closed) == ([], 0)


def test_a_call_that_a_shutdown_ends_is_told_so(monkeypatch: pytest.MonkeyPatch, exits: list[int]) -> None:
    engine = OneError(Health("stopped", False), EngineUnavailable("the engine is stopping"))
    shell = make(monkeypatch, engine)
    original = engine.generate

    async def generate(request: GenerateRequest) -> AsyncGenerator[Any, None]:
        shell.__del__()  # as Serve does while calls are in flight
        async for item in original(request):
            yield item

    monkeypatch.setattr(engine, "generate", generate)
    with pytest.raises(EngineUnavailable, match="stopping"):
        asyncio.run(call(shell))
    assert (exits, engine.closed) == ([], 1)

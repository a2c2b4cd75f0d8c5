"""The ingress' view of targets, on a handle whose targets do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster.core.errors import EngineUnavailable, Overloaded
from cluster.core.types import (
    FinishReason,
    GenerateRequest,
    ModelInfo,
    Origin,
    SamplingParams,
    SpeculationStats,
    StreamItem,
)
from deployments.targets import Targets

SERVED = ModelInfo("model", "Llama", 10, 32, "float32", "torch", True, (), "hash")
OTHER = replace(SERVED, tokenizer_hash="another")
REQUEST = GenerateRequest("lost", (1, 2, 3), SamplingParams(), epoch=2, call_id="call")


class Reply:
    """One replica's answer to a broadcast: None never comes."""

    def __init__(self, value: Any) -> None:
        self.value = value

    async def get_async(self) -> Any:
        if self.value is None:
            await asyncio.sleep(60)
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class Handle:
    """A deployment handle with one stream: some items, then ``error``. ``calls``: what was broadcast."""

    replies: Sequence[Reply] = (Reply(True),)

    def __init__(self, error: Exception | None, *items: StreamItem) -> None:
        self.error, self.items = error, items
        self.calls: list[tuple[Any, ...]] = []

    def options(self, **options: Any) -> Handle:
        return self

    def remote(self, request: GenerateRequest) -> Handle:
        return self

    async def __aiter__(self) -> AsyncIterator[StreamItem]:
        for item in self.items:
            yield item
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        self.calls.append(("cancel",))

    def broadcast(self, *call: Any) -> Handle:
        self.calls.append(call)
        return self

    async def _fetch_replica_results_async(self) -> list[Reply]:
        if self.error is not None:
            raise self.error
        return list(self.replies)


async def read(handle: Handle) -> list[StreamItem]:
    targets: Any = Targets
    items: list[StreamItem] = []
    view = targets(handle, SERVED.model_key)
    try:
        async for item in view.open(REQUEST):
            items.append(item)
    finally:
        await asyncio.sleep(0)  # what goes on in the background begins
        await view.stop()
    return items


def test_a_target_out_of_reach_is_told_to_end_that_attempt() -> None:
    handle = Handle(ActorUnavailableError("the connection is gone", b"0" * 16))
    with pytest.raises(EngineUnavailable):
        asyncio.run(read(handle))
    assert handle.calls == [("cancel",), ("abort", "lost", "call", 2)]


def test_all_targets_are_asked_and_those_that_answer_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.targets.BROADCAST_TIMEOUT_S", 0.1)
    view: Any = Targets
    handle = Handle(None)
    handle.replies = [Reply(("b", 2)), Reply(None), Reply(EngineUnavailable("failed")), Reply(("a", 1))]
    assert asyncio.run(view(handle, SERVED.model_key).loads()) == [("a", 1), ("b", 2)]
    handle.error = DeploymentUnavailableError(DeploymentID("Target", "app"))
    assert asyncio.run(view(handle, SERVED.model_key).loads()) == []
    assert not asyncio.run(view(handle, SERVED.model_key).abort("somebody"))


@pytest.mark.parametrize("failed", [0, 1])
def test_one_target_that_answers_makes_the_service_serve(failed: int) -> None:
    async def refreshed() -> tuple[bool, Any]:
        handle = Handle(None)
        handle.replies = [Reply(SERVED), Reply(EngineUnavailable("the engine is failed"))][:: 1 - 2 * failed]
        view: Any = Targets
        targets = view(handle, SERVED.model_key)
        targets.start()
        await asyncio.sleep(0.05)
        await targets.stop()
        return targets.serving, targets.last_info

    assert asyncio.run(refreshed()) == (True, SERVED)


def test_a_target_that_refuses_or_ends_has_nothing_to_be_told() -> None:
    refusing = Handle(BackPressureError(num_queued_requests=1, max_queued_requests=1))
    with pytest.raises(Overloaded):
        asyncio.run(read(refusing))
    last = StreamItem("lost", (5,), (Origin.TARGET,), 0, "", SpeculationStats(), finish_reason=FinishReason.STOP)
    ending = Handle(None, last)
    assert asyncio.run(read(ending)) == [last]
    assert refusing.calls == ending.calls == []


def test_targets_of_another_model_are_as_good_as_none() -> None:
    async def seen(*replies: Any) -> tuple[bool, Any]:
        handle, view = Handle(None), Targets
        handle.replies = list(map(Reply, replies))
        targets = view(handle, SERVED.model_key)  # type: ignore[arg-type]
        targets.start()
        try:
            return targets.serving, await targets.wait_for_info(0.1)
        except EngineUnavailable:
            return targets.serving, None
        finally:
            await targets.stop()

    assert asyncio.run(seen(OTHER)) == (False, None)
    assert asyncio.run(seen(OTHER, SERVED)) == (False, SERVED)  # not serving when it began to wait

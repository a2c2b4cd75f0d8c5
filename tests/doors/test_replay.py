"""Replay: with a scripted backend, and through the service with a target that is killed in mid-stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest
from doors.conftest import Doors
from doors.fake_engine import Mode, output_token

from cluster.core.errors import DeadlineExceeded, EngineDied, EngineFailed, EngineUnavailable, Overloaded, PacelineError
from cluster.core.types import FinishReason, GenerateRequest, Origin, SamplingParams, SpeculationStats, StreamItem
from deployments.replay import ReplayLimits, generate
from protos import generation_pb2 as pb

LIMITS = ReplayLimits(max_replays=2, timeout_s=5.0)
REQUEST = GenerateRequest("r", (100,), SamplingParams(max_tokens=8, seed=3), timeout_s=30.0)


@dataclass
class ScriptedBackend:
    """Attempt i yields one-token items until ``deaths[i]`` of them came, then raises its error.

    ``serving`` turns true ``back_after_s`` seconds after somebody watches.
    """

    deaths: list[tuple[int, PacelineError]]
    answers: bool = True
    serving: bool = True
    back_after_s: float = 0.0
    seen: list[GenerateRequest] = field(default_factory=list)
    closed: int = 0

    async def open(self, request: GenerateRequest) -> AsyncGenerator[StreamItem, None]:
        number = len(self.seen)
        self.seen.append(request)
        start, rounds = len(request.resume_token_ids), 0
        try:
            for position in range(start, request.params.max_tokens):
                if number < len(self.deaths) and rounds == self.deaths[number][0]:
                    raise self.deaths[number][1]
                rounds += 1
                last = position + 1 == request.params.max_tokens
                yield StreamItem(
                    request.request_id,
                    (output_token(request, position),),
                    (Origin.TARGET,),
                    position,
                    "x",
                    SpeculationStats(rounds, 2 * rounds, 0, (rounds, 0, 0)),
                    seed=request.params.seed if rounds == 1 else None,
                    finish_reason=FinishReason.LENGTH if last else None,
                )
            if number < len(self.deaths) and rounds == self.deaths[number][0]:
                raise self.deaths[number][1]
        finally:
            self.closed += 1

    async def watch(self) -> AsyncGenerator[bool, None]:
        yield self.serving
        await asyncio.sleep(self.back_after_s)
        self.serving = True
        yield True

    async def probe(self, timeout_s: float) -> None:
        if not self.answers:
            raise EngineUnavailable("nobody")


async def collect(backend: ScriptedBackend, request: GenerateRequest = REQUEST) -> list[StreamItem]:
    return [item async for item in generate(backend, request, LIMITS)]


def died() -> EngineDied:
    return EngineDied("died")


def test_the_client_sees_one_unbroken_stream_over_three_targets() -> None:
    backend = ScriptedBackend([(3, died()), (2, died())])
    items = asyncio.run(collect(backend))
    assert [item.position for item in items] == list(range(8))
    assert [item.token_ids[0] for item in items] == [output_token(REQUEST, position) for position in range(8)]
    assert [item.seed for item in items] == [3] + [None] * 7
    assert items[-1].stats == SpeculationStats(8, 16, 0, (8, 0, 0))
    assert [request.epoch for request in backend.seen] == [0, 1, 2]
    assert [len(request.resume_token_ids) for request in backend.seen] == [0, 3, 5]


def test_a_death_after_the_last_item_is_nobodys_concern() -> None:
    backend = ScriptedBackend([(8, died())])
    items = asyncio.run(collect(backend))
    assert len(items) == 8
    assert len(backend.seen) == 1


def test_a_request_that_comes_while_targets_restart_waits_for_one() -> None:
    backend = ScriptedBackend([], serving=False, back_after_s=0.05)
    assert len(asyncio.run(collect(backend))) == 8
    assert [request.epoch for request in backend.seen] == [0]


@pytest.mark.parametrize(("timeout_s", "error"), [(0.05, DeadlineExceeded), (None, EngineUnavailable)])
def test_a_restart_is_waited_for_no_longer_than_the_limits_allow(
    timeout_s: float | None, error: type[PacelineError]
) -> None:
    backend = ScriptedBackend([], serving=False, back_after_s=60.0)
    request = GenerateRequest("r", (100,), SamplingParams(max_tokens=8), timeout_s=timeout_s)

    async def run() -> None:
        async for _ in generate(backend, request, ReplayLimits(max_replays=2, timeout_s=0.2)):
            pass

    with pytest.raises(error):
        asyncio.run(run())
    assert not backend.seen


def test_the_clients_own_resumed_tokens_come_first() -> None:
    backend = ScriptedBackend([(1, died())])
    request = GenerateRequest("r", (100,), SamplingParams(max_tokens=8), resume_token_ids=(7, 8))
    items = asyncio.run(collect(backend, request))
    assert backend.seen[1].resume_token_ids == (7, 8, *items[0].token_ids)


def test_after_max_replays_the_error_is_unavailable() -> None:
    backend = ScriptedBackend([(1, died())] * 3)
    with pytest.raises(EngineUnavailable):
        asyncio.run(collect(backend))
    assert len(backend.seen) == 3


def test_a_request_that_crashed_two_engines_is_not_tried_on_a_third() -> None:
    backend = ScriptedBackend([(1, EngineFailed("boom"))] * 3)
    with pytest.raises(EngineFailed):
        asyncio.run(collect(backend))
    assert len(backend.seen) == 2


def test_when_no_target_answers_in_time_the_error_is_unavailable() -> None:
    async def wait() -> None:
        backend = ScriptedBackend([(1, died())], answers=False)
        async for _ in generate(backend, REQUEST, ReplayLimits(2, 0.3)):
            pass

    with pytest.raises(EngineUnavailable, match=r"within 0\.3 s"):
        asyncio.run(wait())


def test_the_requests_own_deadline_ends_the_wait_for_a_target() -> None:
    request = GenerateRequest("r", (100,), SamplingParams(max_tokens=8), timeout_s=0.3)
    with pytest.raises(DeadlineExceeded):
        asyncio.run(collect(ScriptedBackend([(1, died())], answers=False), request))


@pytest.mark.parametrize("refusal", [EngineUnavailable("the engine has stopped"), Overloaded("full")])
def test_targets_that_refuse_a_replay_do_not_use_up_its_deaths(refusal: PacelineError) -> None:
    """One whose engine has failed is offered by the router until its health checks have, too."""
    backend = ScriptedBackend([(3, died()), *[(0, refusal)] * 5, (2, died())])
    items = asyncio.run(collect(backend))
    assert len([item for item in items if item.token_ids]) == 8
    assert [request.epoch for request in backend.seen] == list(range(8))
    assert [request.admitted for request in backend.seen] == [False, *[True] * 7]


def test_a_new_request_is_offered_elsewhere_where_an_engine_has_failed() -> None:
    backend = ScriptedBackend([(0, EngineUnavailable("the engine has stopped"))] * 4)
    assert len(asyncio.run(collect(backend))) == 8
    assert not any(request.admitted for request in backend.seen)


def test_refusals_go_on_no_longer_than_the_limits_allow() -> None:
    async def wait() -> None:
        backend = ScriptedBackend([(1, died()), *[(0, EngineUnavailable("the engine has stopped"))] * 50])
        async for _ in generate(backend, REQUEST, ReplayLimits(2, 0.5)):
            pass

    with pytest.raises(EngineUnavailable, match=r"within 0\.5 s"):
        asyncio.run(wait())


def test_a_refusal_is_not_replayed() -> None:
    backend = ScriptedBackend([(0, Overloaded("full"))])
    with pytest.raises(Overloaded):
        asyncio.run(collect(backend))
    assert len(backend.seen) == 1


def test_closing_the_stream_closes_the_attempt() -> None:
    async def leave() -> ScriptedBackend:
        backend = ScriptedBackend([])
        items = generate(backend, REQUEST, LIMITS)
        await anext(items)
        await items.aclose()
        return backend

    assert asyncio.run(leave()).closed == 1


@pytest.mark.cluster
def test_a_stream_outlives_a_killed_target(doors: Doors) -> None:
    params = pb.SamplingParams(max_tokens=30, seed=9)
    request = pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[Mode.DIE_ONCE, 100]), sampling_params=params)
    before = doors.stub.GetLoad(pb.GetLoadRequest()).replicas[0].worker_pids["target"]
    items = list(doors.stub.GenerateStream(request, timeout=120))
    assert [item.position for item in items] == list(range(0, 30, 3))
    tokens = [token for item in items for token in item.token_ids]
    assert tokens == [(int(Mode.DIE_ONCE) + 100 + 9 + 7 * position) % 258 for position in range(30)]
    assert items[-1].speculation.rounds == 10
    after = doors.stub.GetLoad(pb.GetLoadRequest()).replicas[0].worker_pids["target"]
    assert after != before

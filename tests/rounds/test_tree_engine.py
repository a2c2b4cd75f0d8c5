"""The engine seen from its doors: every way in and every way out, over a tiny model and without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_rig import LENGTH, POISON, PoisonedRank, Rig, ask, run
from fakes import FailingDrafter, InProcessTransport, ScriptedDrafter, always_wrong
from tiny import VOCAB, save_tiny_llama

from cluster.core.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    EngineFailed,
    EngineUnavailable,
    InvalidArgument,
    Overloaded,
)
from cluster.core.types import FinishReason, GenerateRequest, SamplingParams
from cluster.engine.rank import build_rank
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.session import Phase
from drafters.base import Drafter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("target"), layers=2)


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(local: Drafter | None = None, pipeline: Pipeline | None = None, **changes: Any) -> Rig:
        rank = build_rank(folder, "float64", num_slots=4, capacity=LENGTH, scratch=64, threads=1)
        rig = Rig(PoisonedRank(rank.decoder, rank.kv), local, pipeline, changes)
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.verifier.release(10_000)
        rig.engine.close()
        assert not rig.engine._thread.is_alive()


def test_concurrent_requests_get_what_each_would_get_alone(start: Callable[..., Rig]) -> None:
    rig = start(ScriptedDrafter(always_wrong(VOCAB)))
    prompts = [(3, 4), (5,), tuple(range(40)), (9, 9, 9), (8, 1, 2), (250, 3)]

    async def work() -> None:
        alone = [await rig.tokens(ask("alone", prompt)) for prompt in prompts]
        together = await asyncio.gather(*(rig.tokens(ask(f"r{i}", prompt)) for i, prompt in enumerate(prompts)))
        assert together == alone
        assert all(len(tokens) == 12 for tokens in alone)
        await rig.all_is_given_back()

    run(work())


def test_closing_the_iterator_frees_the_slot_within_a_round(start: Callable[..., Rig]) -> None:
    rig = start()

    async def work() -> None:
        rig.verifier.stepped = True
        items = rig.generate(ask("r", tokens=100))
        rig.verifier.release(2)
        await anext(items)
        await items.aclose()
        steps = rig.verifier.steps
        rig.verifier.release(1)
        await rig.all_is_given_back()
        assert rig.verifier.steps <= steps + 1

    run(work())


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.PREFILL, Phase.DECODE], ids=lambda phase: str(phase.value))
@pytest.mark.parametrize("way", ["abort", "cancel"])
def test_a_request_can_leave_in_any_phase(start: Callable[..., Rig], phase: Phase, way: str) -> None:
    rig = start(ScriptedDrafter(always_wrong(VOCAB)), kv_slots=4, prefill_chunk=1)

    async def work() -> None:
        rig.verifier.stepped = True
        names = [f"other{i}" for i in range(4 if phase is Phase.WAITING else 3)]
        others = [asyncio.create_task(rig.tokens(ask(name, tokens=100))) for name in names]
        await rig.step_until(lambda: all(rig.phase_of(name) is Phase.DECODE for name in names))
        prompt = range(2, 60) if phase is Phase.PREFILL else (5,)
        leaving = asyncio.create_task(rig.tokens(ask("leaving", prompt, tokens=100)))
        await rig.step_until(lambda: rig.phase_of("leaving") is phase)
        if way == "abort":
            assert rig.engine.abort("leaving")
        else:
            leaving.cancel()
        rig.verifier.release(10_000)
        with pytest.raises(Aborted if way == "abort" else asyncio.CancelledError):
            await leaving
        assert [len(tokens) for tokens in await asyncio.gather(*others)] == [100] * len(others)
        await rig.all_is_given_back()

    run(work())


def test_an_abort_reaches_a_request_the_engine_thread_has_not_seen_yet(start: Callable[..., Rig]) -> None:
    rig = start()

    async def work() -> None:
        rig.verifier.stepped = True
        busy = asyncio.create_task(rig.tokens(ask("busy")))
        await rig.wait_until(lambda: rig.scheduler.num_running == 1)
        young = asyncio.create_task(rig.tokens(ask("young")))
        await asyncio.sleep(0)
        assert rig.engine.abort("young")
        assert not rig.engine.abort("nobody")
        rig.verifier.release(10_000)
        with pytest.raises(Aborted):
            await young
        assert len(await busy) == 12
        await rig.all_is_given_back()

    run(work())


def test_a_late_abort_leaves_the_next_call_of_the_same_id_and_a_later_attempt_alone(start: Callable[..., Rig]) -> None:
    rig = start()

    async def work() -> None:
        rig.verifier.stepped = True
        again = asyncio.create_task(rig.tokens(replace(ask("again"), call_id="second", epoch=1)))
        await rig.wait_until(lambda: rig.scheduler.num_running == 1)
        assert not rig.engine.abort("again", "first")
        assert not rig.engine.abort("again", "second", epoch=0)
        rig.verifier.release(10_000)
        assert len(await again) == 12
        await rig.all_is_given_back()

    run(work())


def test_an_attempt_takes_the_place_of_the_one_it_replays(start: Callable[..., Rig]) -> None:
    rig = start()

    async def work() -> None:
        rig.verifier.stepped = True
        first = replace(ask("replayed"), call_id="one")
        lost = asyncio.create_task(rig.tokens(first))
        await rig.wait_until(lambda: rig.scheduler.num_running == 1)
        for other in (replace(first, call_id="two", epoch=1), first):
            with pytest.raises(AlreadyExists, match="running already"):
                await rig.tokens(other)
        replay = asyncio.create_task(rig.tokens(replace(first, epoch=1)))
        with pytest.raises(Aborted, match="another call"):  # although the engine's thread is in the middle of a step
            await asyncio.wait_for(lost, 10.0)
        rig.verifier.release(10_000)
        assert len(await replay) == 12
        await rig.all_is_given_back()

    run(work())


def test_an_id_that_is_running_is_refused_and_may_be_used_again_at_once_when_it_is_not(
    start: Callable[..., Rig],
) -> None:
    rig = start(ScriptedDrafter(always_wrong(VOCAB)))

    async def work() -> None:
        expected = await rig.tokens(ask("r"))
        rig.verifier.stepped = True
        items = rig.generate(ask("r", (1, 2), tokens=100))
        rig.verifier.release(3)
        await anext(items)
        with pytest.raises(AlreadyExists):
            await rig.tokens(ask("r"))
        await items.aclose()
        again = asyncio.create_task(rig.tokens(ask("r")))
        await asyncio.sleep(0)
        rig.verifier.release(10_000)
        assert await again == expected
        await rig.all_is_given_back()

    run(work())


def test_an_id_used_again_finds_nothing_of_the_earlier_session_in_slow_draft_workers(
    start: Callable[..., Rig],
) -> None:
    workers = {"small": DraftWorker("small", ScriptedDrafter(always_wrong(VOCAB)))}
    transport = InProcessTransport(workers)
    transport.delay_s = (0.0, 0.03)
    release = transport.close
    transport.close = lambda session_id: None  # type: ignore[method-assign]
    pipeline = Pipeline(transport, ("small",), VOCAB, 8)
    rig = start(None, pipeline, draft_deadline_min_ms=10, draft_deadline_max_ms=10)

    async def work() -> None:
        expected = {length: await rig.tokens(ask("r", range(2, length))) for length in (60, 5, 30)}
        for length, tokens in [*expected.items()] * 3:
            assert await rig.tokens(ask("r", range(2, length))) == tokens
        await rig.all_is_given_back()

    run(work())
    transport.join()
    assert pipeline.num_sessions == 0
    for session_id in list(transport._open):
        release(session_id)
    assert workers["small"].num_sessions == 0


def test_more_requests_than_may_wait_are_refused_and_a_replay_is_not(start: Callable[..., Rig]) -> None:
    rig = start()

    async def work() -> None:
        rig.verifier.stepped = True
        running = [asyncio.create_task(rig.tokens(ask(f"r{i}", tokens=60))) for i in range(4)]
        await rig.step_until(lambda: rig.scheduler.num_running == 4)
        waiting = [asyncio.create_task(rig.tokens(ask(f"w{i}"))) for i in range(2)]
        await rig.step_until(lambda: rig.scheduler.num_waiting == 2)
        refused = asyncio.create_task(rig.tokens(ask("one too many")))
        await rig.step_until(refused.done)
        with pytest.raises(Overloaded):
            await refused
        load = rig.engine.load()
        assert (load.waiting, load.max_waiting, load.stats.refused) == (2, 2, 1)
        replays = [asyncio.create_task(rig.tokens(ask(f"replay{i}", admitted=True))) for i in range(3)]
        await rig.step_until(lambda: rig.scheduler.num_waiting == 5)
        order = [session.request.request_id for session in rig.scheduler._waiting]
        assert order == ["replay0", "replay1", "replay2", "w0", "w1"]
        rig.verifier.release(10_000)
        assert [len(tokens) for tokens in await asyncio.gather(*running, *waiting, *replays)] == [60] * 4 + [12] * 5
        await rig.all_is_given_back()

    run(work())


def test_closing_the_engine_ends_every_request_and_refuses_new_ones(start: Callable[..., Rig]) -> None:
    rig = start()

    async def work() -> None:
        rig.verifier.stepped = True
        waiting = [asyncio.create_task(rig.tokens(ask(f"r{i}", tokens=100))) for i in range(6)]
        await rig.step_until(lambda: rig.scheduler.num_running == 4)
        late = asyncio.create_task(rig.tokens(ask("late")))  # in the inbox, behind the step that runs
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(rig.engine.close))
        await asyncio.sleep(0.05)
        rig.verifier.release(1)
        for task in [*waiting, late]:
            with pytest.raises((EngineUnavailable, Overloaded)):
                await task
        await closing
        with pytest.raises(EngineUnavailable):
            await rig.tokens(ask("too late"))

    run(work())
    assert not rig.engine.health().ok


def test_a_failing_step_ends_every_request_but_is_the_fault_of_those_in_it_alone(start: Callable[..., Rig]) -> None:
    rig = start()

    async def work() -> None:
        rig.verifier.stepped = True
        running = asyncio.create_task(rig.tokens(ask("running", tokens=100)))
        await rig.wait_until(lambda: rig.scheduler.num_running == 1)
        unseen = asyncio.create_task(rig.tokens(ask("unseen")))
        await asyncio.sleep(0)
        assert rig.engine.health().ok
        rig.verifier.failing = True
        rig.verifier.release(1)
        with pytest.raises(EngineFailed):
            await running
        with pytest.raises(EngineUnavailable):
            await unseen
        assert not rig.engine.health().ok
        assert "out of memory" in rig.engine.health().detail
        with pytest.raises(EngineUnavailable):
            await rig.tokens(ask("too late"))

    run(work())


@pytest.mark.parametrize("prompt", [(POISON,), (POISON, 0)], ids=["NaN row", "text that raises"])
def test_a_session_that_cannot_go_on_fails_alone(start: Callable[..., Rig], prompt: tuple[int, ...]) -> None:
    rig = start()

    async def work() -> None:
        expected = await rig.tokens(ask("alone", tokens=30))
        good = asyncio.create_task(rig.tokens(ask("good", tokens=30)))
        with pytest.raises(EngineFailed):
            await rig.tokens(ask("bad", prompt))
        assert await good == expected
        assert rig.engine.health().ok
        await rig.all_is_given_back()

    run(work())


@pytest.mark.parametrize(
    "request_",
    [
        ask("empty", ()),
        ask("long", [1] * LENGTH),
        ask("id", [VOCAB]),
        ask("resumed", resume_token_ids=(-1,)),
        GenerateRequest("bias", (1,), SamplingParams(logit_bias=((VOCAB, 1.0),))),
    ],
    ids=lambda request: str(request.request_id),
)
def test_a_request_that_would_break_a_step_is_refused(start: Callable[..., Rig], request_: GenerateRequest) -> None:
    rig = start()

    async def work() -> None:
        with pytest.raises(InvalidArgument):
            await rig.tokens(request_)
        assert len(await rig.tokens(ask("good"))) == 12

    run(work())


@pytest.mark.parametrize("where", ["begin", "propose", "commit", "end", "propose for one"])
@pytest.mark.parametrize("side", ["local", "worker"])
def test_a_drafter_that_raises_costs_speed_only(start: Callable[..., Rig], where: str, side: str) -> None:
    drafter = FailingDrafter(always_wrong(VOCAB), where)
    worker = DraftWorker("small", drafter)
    transport = InProcessTransport({"small": worker})
    pipeline = Pipeline(transport, ("small",), VOCAB, 8)
    rig = start(drafter) if side == "local" else start(None, pipeline, draft_deadline_min_ms=20)

    async def work() -> None:
        plain = await start().tokens(ask("plain", tokens=20))
        names = ["a", "b", "c"]
        drafted = await asyncio.gather(*(rig.tokens(ask(name, tokens=20)) for name in names))
        assert drafted == [plain] * 3
        assert rig.engine.health().ok
        await rig.all_is_given_back()

    run(work())
    assert drafter.raised > 0
    transport.join()
    assert worker.num_sessions == 0


def test_a_request_ends_at_its_deadline(start: Callable[..., Rig]) -> None:
    rig = start()

    async def work() -> None:
        rig.verifier.stepped = True
        with pytest.raises(DeadlineExceeded):
            await rig.tokens(ask("r", timeout_s=0.05))
        rig.verifier.release(1)
        await rig.all_is_given_back()

    run(work())


def test_sessions_that_are_over_leave_nothing_behind(start: Callable[..., Rig]) -> None:
    local = ScriptedDrafter(always_wrong(VOCAB))
    workers = {"small": DraftWorker("small", ScriptedDrafter(always_wrong(VOCAB)))}
    transport = InProcessTransport(workers)
    pipeline = Pipeline(transport, ("small",), VOCAB, 8)
    rig = start(local, pipeline)

    async def work() -> None:
        for at in range(10):
            async with asyncio.TaskGroup() as group:
                for session in range(4):
                    group.create_task(rig.tokens(ask(f"{at}-{session}", tokens=3)))
        await rig.all_is_given_back()

    run(work())
    transport.join()
    assert local.tokens == {}
    assert pipeline.num_sessions == workers["small"].num_sessions == 0


def test_a_resumed_request_that_was_over_gets_its_closing_item_only(start: Callable[..., Rig]) -> None:
    rig = start()

    async def work() -> None:
        whole = await rig.tokens(ask("r"))
        async with aclosing(rig.generate(ask("r", resume_token_ids=tuple(whole)))) as items:
            (item,) = [item async for item in items]
        assert item.token_ids == ()
        assert item.finish_reason is FinishReason.LENGTH
        await rig.all_is_given_back()

    run(work())

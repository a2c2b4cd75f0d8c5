"""Prefix reuse and preemption: the tokens stay what they would have been, whatever K/V was there already."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from exactness_rig import FLAT, GREEDY, SAMPLED, NoText, Rig, outputs, plain, requests, stages
from fakes import ScriptedDrafter, always_wrong
from tiny import VOCAB

from cluster.core.types import GenerateRequest, SamplingParams
from cluster.engine.verifier import Verifier
from cluster.rounds.detokenize import TextStream
from cluster.rounds.scheduler import Scheduler
from cluster.rounds.session import Phase, Session
from drafters.base import Drafter

DRAFTERS = ("sssd", "draft_model", "swift", "staged", "staged_swift")


@pytest.fixture(scope="module")
def expected(rig: Rig) -> dict[SamplingParams, dict[str, list[int]]]:
    return {params: plain(rig, params) for params in (GREEDY, SAMPLED)}


class Bench:
    """A scheduler over the rig that lives on from request to request."""

    def __init__(self, rig: Rig, local: Drafter | None = None, **changes: object) -> None:
        self._rig = rig
        self.scheduler = Scheduler(rig.config(**changes), Verifier(rig.rank), FLAT, local, None, rig.slots)

    def submit(self, *requests: GenerateRequest) -> list[Session]:
        sessions = [Session(request, self._rig.limits, TextStream(NoText())) for request in requests]
        for session in sessions:
            self.scheduler.submit(session)
        return sessions

    def run(self, *requests: GenerateRequest, each_step: Callable[[int], None] = lambda step: None) -> list[Session]:
        sessions = self.submit(*requests)
        step = 0
        while not self.scheduler.idle:
            for outcome in self.scheduler.step():
                assert outcome.error is None
            each_step(step)
            self._rig.rank.kv.check()
            step += 1
        assert self._rig.rank.kv.num_free == self._rig.rank.kv.num_slots
        assert self._rig.slots == self.scheduler._prefilled == {}
        return sessions


def chat(rig: Rig, params: SamplingParams, local: Drafter | None, reuse: bool) -> Iterator[Session]:
    """Three turns: each prompt is all that came before, and a few tokens more."""
    bench = Bench(rig, local, prefix_reuse=reuse)
    prompt: list[int] = list(range(20, 50))
    for turn in range(3):
        (session,) = bench.run(GenerateRequest(f"turn{turn}", tuple(prompt), params))
        yield session
        prompt = [*session.tokens, 5 + turn, 9]


def test_what_another_scheduler_left_in_a_slot_is_not_taken_for_ones_own(rig: Rig) -> None:
    def ask(name: str, first: int) -> GenerateRequest:
        return GenerateRequest(name, tuple(range(first, first + 40)), GREEDY)

    mine, others = Bench(rig), Bench(rig)
    (before,) = mine.run(ask("a", 20))
    for number in range(2 * rig.rank.kv.num_slots):
        others.run(ask(f"o{number}", 50 + number))
    (after,) = mine.run(ask("b", 20))
    assert after.tokens == before.tokens


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["none", *DRAFTERS])
def test_a_chats_next_turn_computes_only_what_is_new_and_says_the_same(
    rig: Rig, draft_folder: Path, name: str, params: SamplingParams
) -> None:
    local = None if name == "none" else rig.drafter(stages(draft_folder, rig.dtype)[name])
    anew = [session.tokens for session in chat(rig, params, None, reuse=False)]
    turns = list(chat(rig, params, local, reuse=True))
    assert [session.tokens for session in turns] == anew
    assert turns[0].cached_tokens == 0
    for before, after in itertools.pairwise(turns):
        # All but the last token, whose K/V no step needed.
        assert after.cached_tokens == before.base - 1


def test_sessions_that_begin_alike_share_what_runs_and_what_is_over(rig: Rig) -> None:
    system = list(range(60, 100))
    asks = [GenerateRequest(f"r{i}", (*system, 3 + i, 7), GREEDY) for i in range(6)]
    alone = [Bench(rig, prefix_reuse=False).run(ask)[0].tokens for ask in asks]
    bench = Bench(rig, ScriptedDrafter(always_wrong(VOCAB)))
    sessions = bench.submit(asks[0])
    for _ in range(3):
        bench.scheduler.step()
    sessions += bench.run(*asks[1:])
    assert [session.tokens for session in sessions] == alone
    assert [session.cached_tokens for session in sessions] == [0] + [len(system)] * 5


def test_another_salt_shares_nothing(rig: Rig) -> None:
    bench = Bench(rig)
    prompt = tuple(range(20, 60))
    found = [
        bench.run(GenerateRequest(f"r{i}", prompt, GREEDY, cache_salt=salt))[0].cached_tokens
        for i, salt in enumerate(("a", "b", "", "a"))
    ]
    assert found == [0, 0, 0, len(prompt) - 1]


def test_a_prompt_cut_short_by_a_stop_leaves_only_what_it_emitted(rig: Rig) -> None:
    prompt = tuple(range(20, 40))
    bench = Bench(rig, prefix_reuse=False)
    (whole,) = bench.run(GenerateRequest("whole", prompt, GREEDY))
    output = whole.tokens[len(prompt) :]
    stop = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop_token_ids=(output[5],))

    def oracle(tokens: list[int], ask: object) -> object:
        from cluster.core.token_tree import TokenTree

        return TokenTree.chain(output[len(tokens) - len(prompt) :][:8], stage=1)

    bench = Bench(rig, ScriptedDrafter(oracle))  # type: ignore[arg-type]
    (cut,) = bench.run(GenerateRequest("cut", prompt, stop))
    assert cut.base <= len(prompt) + 6
    (again,) = bench.run(GenerateRequest("again", (*cut.tokens, 8, 9), GREEDY))
    (anew,) = Bench(rig, prefix_reuse=False).run(GenerateRequest("anew", (*cut.tokens, 8, 9), GREEDY))
    assert again.tokens == anew.tokens
    assert again.cached_tokens == cut.base


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["none", *DRAFTERS])
def test_preemption_at_every_point_changes_no_token(
    rig: Rig,
    draft_folder: Path,
    expected: dict[SamplingParams, dict[str, list[int]]],
    name: str,
    params: SamplingParams,
) -> None:
    local = None if name == "none" else rig.drafter(stages(draft_folder, rig.dtype)[name])
    bench = Bench(rig, local, kv_slots=8, prefill_chunk=7)
    preempted = 0

    def preempt(step: int) -> None:
        nonlocal preempted
        running = bench.scheduler._running
        if running and step < 120:
            victim = running[step % len(running)]
            bench.scheduler.preempt(victim)
            assert victim.phase is Phase.WAITING
            preempted += 1

    sessions = bench.run(*requests(params), each_step=preempt)
    assert {s.request.request_id: s.tokens[s.prompt_len :] for s in sessions} == expected[params]
    assert preempted >= 12
    assert bench.scheduler.meter.snapshot().preemptions == preempted


def test_preemption_without_reuse_changes_no_token(
    rig: Rig, expected: dict[SamplingParams, dict[str, list[int]]]
) -> None:
    bench = Bench(rig, ScriptedDrafter(always_wrong(VOCAB)), prefix_reuse=False)

    def preempt(step: int) -> None:
        if step % 5 == 4 and bench.scheduler._running:
            bench.scheduler.preempt(bench.scheduler._running[-1])

    sessions = bench.run(*requests(SAMPLED), each_step=preempt)
    assert outputs({s.request.request_id: s for s in sessions}) == expected[SAMPLED]


def crowd(rig: Rig, arrivals: Sequence[tuple[int, GenerateRequest]], **changes: object) -> tuple[list[str], Bench]:
    """Requests that come at a given step; the order in which they end. Three slots' worth of the rig's eight."""
    bench = Bench(rig, **changes)
    held = [rig.rank.kv.allocate() for _ in range(rig.rank.kv.num_slots - 3)]
    sessions: list[Session] = []
    ended: list[str] = []
    for step in range(2000):
        for at, request in arrivals:
            if at == step:
                sessions += bench.submit(request)
        for outcome in bench.scheduler.step():
            if outcome.session.finish_reason is not None:
                ended.append(outcome.session.request.request_id)
        if len(ended) == len(arrivals):
            break
    for slot in held:
        rig.rank.kv.free(slot)
    rig.rank.kv.check()
    return ended, bench


def ask(name: str, tokens: int = 24, **fields: int) -> GenerateRequest:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return GenerateRequest(name, tuple(range(10, 30)), params, **fields)


def test_a_request_of_higher_priority_does_not_wait_for_the_others(rig: Rig) -> None:
    late = [(0, ask(f"late{i}", 60, priority=1)) for i in range(4)]
    ended, bench = crowd(rig, [*late, (10, ask("urgent", 20)), (12, ask("most urgent", 20, priority=-5))])
    assert set(ended[:2]) == {"urgent", "most urgent"}
    assert len(ended) == 6
    assert bench.scheduler.meter.snapshot().preemptions >= 2


def test_equals_wait_for_each_other(rig: Rig) -> None:
    ended, bench = crowd(rig, [(0, ask(f"r{i}", 20 + i)) for i in range(6)])
    assert ended == [f"r{i}" for i in range(6)]
    assert bench.scheduler.meter.snapshot().preemptions == 0


def test_a_replay_that_waited_gets_a_new_requests_slot(rig: Rig) -> None:
    arrivals = [(0, ask(f"r{i}", 60)) for i in range(3)] + [(5, ask("replay", 20, epoch=1, admitted=True))]
    ended, bench = crowd(rig, arrivals, preempt_after_s=0.0)
    assert ended[0] == "replay"
    assert ended[1:] == ["r0", "r1", "r2"]
    assert bench.scheduler.meter.snapshot().preemptions == 1
    ended, bench = crowd(rig, arrivals, preempt_after_s=1000.0)
    assert bench.scheduler.meter.snapshot().preemptions == 0


def test_under_a_stream_of_urgent_requests_the_others_go_on(rig: Rig) -> None:
    late = [(0, ask(f"late{i}", 40, priority=1)) for i in range(3)]
    urgent = [(at, ask(f"urgent{at}", 6)) for at in range(2, 300, 4)]
    ended, bench = crowd(rig, [*late, *urgent])
    assert len(ended) == len(late) + len(urgent)
    assert max(ended.index(f"late{i}") for i in range(3)) < len(ended) - 1
    assert bench.scheduler.meter.snapshot().preemptions > 0


def test_a_prompt_as_long_as_the_context_is_read_and_answered(rig: Rig) -> None:
    length = rig.limits.max_model_len
    prompt = tuple(2 + at % 200 for at in range(length - 8))
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    (session,) = Bench(rig, ScriptedDrafter(always_wrong(VOCAB))).run(GenerateRequest("long", prompt, params))
    assert session.num_output == 8
    assert session.base == length

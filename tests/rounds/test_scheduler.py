"""Who gets which rows of a step, and what the governor makes of the drafters it has."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
from fakes import InProcessTransport, ScriptedDrafter, always_wrong, oracle
from tiny import VOCAB, save_tiny_llama

from cluster.core.accept import Accepted
from cluster.core.config import EngineConfig
from cluster.core.errors import ConfigError, EngineFailed
from cluster.core.token_tree import TokenTree
from cluster.core.types import GenerateRequest, Origin, SamplingParams, Speculation
from cluster.engine.rank import Rank, build_rank
from cluster.engine.step_cost import CostCurve
from cluster.engine.verifier import Prefill, Verifier, Verify, VerifySpent
from cluster.rounds.detokenize import TextStream
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.governor import Governor, RoundSpent, Shape
from cluster.rounds.modes import ALTERNATING, LOCAL, MIN_ROUNDS, PLAIN, REMOTE, alternation_pays
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.remote_use import EXPEDITION_GAP_S, EXPEDITION_S
from cluster.rounds.scheduler import Scheduler
from cluster.rounds.session import Limits, Session
from drafters.base import Ask, Drafter

LENGTH = 256
STEEP = CostCurve((1, 64), (1.0, 10.0))  # a node must be likely to pay
FLAT = CostCurve((1, 64), (1.0, 1.0))


class NoText:
    def step(self, token: int) -> str:
        return ""


class CountingVerifier(Verifier):
    """Notes the rows of every step: (prefill rows, tree rows)."""

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self.rows: list[tuple[int, int]] = []

    def step(
        self, prefills: Sequence[Prefill], verifies: Sequence[Verify]
    ) -> tuple[list[Accepted | EngineFailed], VerifySpent]:
        prompts = sum(len(chunk.token_ids) for chunk in prefills) + sum(len(v.lead) for v in verifies)
        self.rows.append((prompts, sum(len(v.tree) + 1 for v in verifies)))
        return super().step(prefills, verifies)


class Rig:
    def __init__(
        self,
        rank: Rank,
        local: Drafter | None = None,
        pipeline: Pipeline | None = None,
        curve: CostCurve = FLAT,
        **changes: object,
    ) -> None:
        settings = {"max_model_len": LENGTH, "kv_slots": 8, "max_waiting": 99, "max_nodes": 16, "governor": "always"}
        self.config = EngineConfig.model_validate(settings | changes)
        self.verifier = CountingVerifier(rank)
        self.scheduler = Scheduler(self.config, self.verifier, curve, local, pipeline)

    def submit(self, prompt: Sequence[int], tokens: int = 20, stops: tuple[int, ...] = (), **wish: object) -> Session:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, stop_token_ids=stops)
        request = GenerateRequest("r", tuple(prompt), params, speculation=Speculation(**wish))  # type: ignore[arg-type]
        session = Session(request, Limits(LENGTH, frozenset()), TextStream(NoText()))
        self.scheduler.submit(session)
        return session

    def run(self) -> None:
        while not self.scheduler.idle:
            self.scheduler.step()


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Rank:
    folder = save_tiny_llama(tmp_path_factory.mktemp("target"), layers=1)
    return build_rank(folder, "float64", num_slots=8, capacity=LENGTH, scratch=64, threads=1)


@pytest.mark.parametrize("governor", ["always", "auto"])
@pytest.mark.parametrize("max_rows", [8, 12, 40])
def test_no_step_has_more_rows_than_allowed_and_every_step_brings_every_decoding_session_on(
    rank: Rank, max_rows: int, governor: str
) -> None:
    rig = Rig(rank, ScriptedDrafter(always_wrong(VOCAB)), max_rows=max_rows, governor=governor, prefill_chunk=16)
    sessions = [rig.submit(range(2, 2 + length)) for length in (1, 100, 5, 60, 1, 30, 2, 90, 40, 1)]
    while not rig.scheduler.idle:
        before = {s.id: s.num_output for s in sessions if s.phase.value == "decode"}
        rig.scheduler.step()
        assert all(s.num_output > before[s.id] for s in sessions if s.id in before)
    assert max(prefill + tree for prefill, tree in rig.verifier.rows) <= max_rows
    assert all(session.num_output == 20 for session in sessions)


def test_guesses_behind_a_stop_count_as_accepted_nowhere(rank: Rank) -> None:
    plain = Rig(rank)
    session = plain.submit([3, 4], tokens=40)
    plain.run()
    output = session.tokens[2:]
    at = max(output.index(token) for token in output)
    stopped = Rig(rank, ScriptedDrafter(oracle({(3, 4): output})))
    session = stopped.submit([3, 4], tokens=40, stops=(output[at],))
    stopped.run()
    assert session.tokens[2:] == output[: at + 1]
    stats = stopped.scheduler.meter.snapshot()
    assert stats.drafted["small"] > stats.accepted["small"]
    assert stats.accepted["small"] + stats.drafts >= at + 1 >= stats.accepted["small"]


def test_ways_of_guessing_are_measured_beside_sessions_that_want_no_guesses(rank: Rank) -> None:
    rig = Rig(rank, ScriptedDrafter(always_wrong(VOCAB)), governor="auto")
    rig.submit([3], tokens=150)
    rig.submit([4], tokens=150, enabled=False)
    rig.run()
    assert rig.scheduler.governor.modes.rounds[LOCAL] > 50
    beside = Rig(rank, ScriptedDrafter(always_wrong(VOCAB)), governor="auto")
    beside.submit([4], tokens=150, enabled=False)
    beside.run()
    assert not beside.scheduler.governor.modes.rounds


def test_a_prompt_is_read_at_a_fair_pace_beside_sessions_with_large_trees(rank: Rank) -> None:
    rig = Rig(rank, ScriptedDrafter(always_wrong(VOCAB)), max_rows=32, prefill_chunk=16)
    for _ in range(4):
        rig.submit([3], tokens=60)
    rig.scheduler.step()
    assert rig.verifier.rows[-1] == (0, 32)
    rig.submit(range(2, 163))
    for _ in range(10):
        rig.scheduler.step()
    assert [prefill for prefill, _ in rig.verifier.rows[1:]] == [16] * 10
    rig.scheduler.step()
    assert rig.verifier.rows[-1][0] == 0
    rig.run()


def test_a_prompt_alone_fills_its_steps_and_the_last_of_them_yields_the_first_token(rank: Rank) -> None:
    rig = Rig(rank, max_rows=32)
    session = rig.submit(range(2, 102))
    for _ in range(4):
        assert session.num_output == 0
        rig.scheduler.step()
    assert session.num_output == 1
    assert rig.verifier.rows == [(32, 0), (32, 0), (32, 0), (3, 1)]
    rig.run()


def test_several_prompts_share_a_step(rank: Rank) -> None:
    rig = Rig(rank, max_rows=32)
    sessions = [rig.submit(range(2, 2 + length)) for length in (5, 7, 9)]
    rig.scheduler.step()
    assert [session.num_output for session in sessions] == [1, 1, 1]
    assert rig.verifier.rows == [(4 + 6 + 8, 3)]
    rig.run()


def test_prompts_fill_the_steps_of_running_sessions(rank: Rank) -> None:
    rig = Rig(rank, max_rows=32, prefill_chunk=24)
    for start in (2, 3):
        rig.submit(range(start, start + 40), tokens=60)
    rig.run()
    assert rig.verifier.rows[:4] == [(32, 0), (7 + 24, 1), (15, 2), (0, 2)]  # 32 while nobody decodes, then 24


def test_more_slots_than_rows_are_refused() -> None:
    with pytest.raises((ConfigError, ValueError), match="kv_slots"):
        EngineConfig(kv_slots=65, max_rows=64)


def test_a_drafter_that_is_always_sure_and_always_wrong_is_found_out(rank: Rank) -> None:
    rig = Rig(rank, ScriptedDrafter(always_wrong(VOCAB)), curve=STEEP, governor="auto")
    early = rig.submit([3], tokens=100)
    rig.run()
    late = rig.submit([3], tokens=200)
    rig.run()
    assert early.stats.drafted > 0
    assert late.stats.drafted / late.stats.rounds < 0.3


def test_a_drafter_that_is_always_right_is_used(rank: Rank) -> None:
    rig = Rig(rank)
    session = rig.submit([3], tokens=150)
    rig.run()
    truth = {(3,): session.tokens[1:]}
    rig = Rig(rank, ScriptedDrafter(oracle(truth)), curve=CostCurve((1, 64), (1.0, 2.0)), governor="auto")
    session = rig.submit([3], tokens=150)
    rig.run()
    assert session.stats.mean_accepted_length > 3


def test_stages_without_a_worker_are_not_measured(rank: Rank) -> None:
    transport = InProcessTransport({})
    pipeline = Pipeline(transport, ("small",), VOCAB, 16)
    rig = Rig(rank, ScriptedDrafter(always_wrong(VOCAB)), pipeline, governor="auto")
    rig.submit([3], tokens=200)
    rig.run()
    assert set(rig.scheduler.governor.modes.steps) == {LOCAL, PLAIN}


def test_a_local_drafter_that_costs_more_than_it_brings_is_hardly_asked(rank: Rank) -> None:
    asked = 0
    rubbish = always_wrong(VOCAB)

    def dear(tokens: list[int], ask: Ask) -> TokenTree:
        nonlocal asked
        asked += 1
        time.sleep(0.01)
        return rubbish(tokens, ask)

    rig = Rig(rank, ScriptedDrafter(dear), curve=CostCurve((1, 64), (1e-3, 1e-2)), governor="auto")
    rig.submit([3], tokens=250)
    rig.run()
    assert 0 < asked < 60


def test_remote_stages_are_measured_once_they_hold_the_session(rank: Rank) -> None:
    workers = {"small": DraftWorker("small", ScriptedDrafter(always_wrong(VOCAB)))}
    transport = InProcessTransport(workers)
    rig = Rig(rank, None, Pipeline(transport, ("small",), VOCAB, 16), governor="auto", draft_deadline_min_ms=100)
    rig.submit([3], tokens=200)
    rig.run()
    assert set(rig.scheduler.governor.modes.steps) == {PLAIN, REMOTE}
    transport.join()


def test_workers_that_are_all_left_out_are_probed_and_used_again(rank: Rank) -> None:
    plain = Rig(rank)
    session = plain.submit([3], tokens=200)
    plain.run()
    drafter, ahead_s = ScriptedDrafter(oracle({(3,): session.tokens[1:]})), 0.0
    transport = InProcessTransport({"small": DraftWorker("small", drafter)})
    pipeline = Pipeline(transport, ("small",), VOCAB, 16, clock=lambda: ahead_s + time.monotonic())
    rig = Rig(rank, None, pipeline, governor="auto", draft_deadline_min_ms=200, draft_deadline_max_ms=200)
    session = rig.submit([3], tokens=200)
    while not pipeline.reachable([session.id]) or not pipeline.follows([session.id]):
        rig.scheduler.step()
        transport.join()
    transport.dead = {"small"}
    while not pipeline.broken:
        rig.scheduler.step()
        transport.join()
    calls = transport.calls
    for _ in range(3):
        rig.scheduler.step()
    assert transport.calls == calls
    assert not pipeline.reachable([session.id])
    transport.dead, ahead_s = set(), 1.5
    rig.scheduler.step()
    transport.join()
    assert transport.calls == calls + 1
    rig.scheduler.step()
    assert not pipeline.broken
    rig.run()
    assert session.stats.mean_accepted_length > 1


def test_who_waits_for_stages_it_named_holds_nobody_else_up(rank: Rank) -> None:
    workers = {"small": DraftWorker("small", ScriptedDrafter(always_wrong(VOCAB)))}
    transport = InProcessTransport(workers)
    pipeline = Pipeline(transport, ("small",), VOCAB, 16)
    waits = {"draft_deadline_min_ms": 400, "draft_deadline_max_ms": 400}
    rig = Rig(rank, None, pipeline, governor="auto", **waits)
    named = rig.submit([3], tokens=30, stages=("small",))
    while not named.num_output or not pipeline.awaits(named.id, 60.0):
        rig.scheduler.step()
    transport.hung = {"small"}
    transport.join()
    rig.scheduler.step()  # takes the tree that is there, and asks again
    free = rig.submit([4], tokens=100)
    before = named.num_output
    start = time.perf_counter()
    while free.finish_reason is None and time.perf_counter() < start + 0.3:
        rig.scheduler.step()
    assert named.num_output == before
    assert free.num_output > 1
    rig.run()
    assert (named.num_output, free.num_output) == (30, 100)


def test_leases_are_opened_only_where_remote_stages_may_pay(rank: Rank) -> None:
    workers = {"small": DraftWorker("small", ScriptedDrafter(always_wrong(VOCAB)))}
    transport = InProcessTransport(workers)
    transport.delay_s = (0.01, 0.01)
    local = ScriptedDrafter(always_wrong(VOCAB))
    rig = Rig(rank, local, Pipeline(transport, ("small",), VOCAB, 16), governor="auto", draft_deadline_min_ms=100)
    rig.submit([3], tokens=250)
    rig.run()
    remote_use = rig.scheduler._drafting._remote_use
    remote_use._expedition_s -= EXPEDITION_S  # the one that began with the first session is over
    assert rig.scheduler.governor.modes.rounds[REMOTE] >= MIN_ROUNDS
    calls = transport.calls
    late = rig.submit([5], tokens=50)
    rig.scheduler.step()
    rig.scheduler.step()
    assert transport.worker(late.id, "small") is None
    remote_use._expedition_s -= EXPEDITION_GAP_S
    rig.scheduler.step()
    assert transport.worker(late.id, "small") is not None
    rig.run()
    transport.join()
    assert calls > 0
    assert workers["small"].num_sessions == 0


def test_remote_stages_can_be_kept_for_requests_that_name_them(rank: Rank) -> None:
    workers = {"small": DraftWorker("small", ScriptedDrafter(always_wrong(VOCAB)))}
    transport = InProcessTransport(workers)
    rig = Rig(rank, None, Pipeline(transport, ("small",), VOCAB, 16), governor="auto", remote_use="named")
    free = rig.submit([3], tokens=50)
    rig.run()
    transport.join()
    assert (free.num_output, transport.calls) == (50, 0)
    rig.submit([3], tokens=50, stages=("small",))
    rig.run()
    transport.join()
    assert transport.calls > 0


def test_two_groups_of_sessions_take_turns_and_say_what_one_group_says(rank: Rank) -> None:
    prompts = [(10 + at, 3, 4) for at in range(5)]
    plain = Rig(rank)
    wanted = [plain.submit(prompt, tokens=40) for prompt in prompts]
    plain.run()
    truth = {prompt: session.tokens[3:] for prompt, session in zip(prompts, wanted)}
    workers = {"small": DraftWorker("small", ScriptedDrafter(oracle(truth)))}
    pipeline = Pipeline(InProcessTransport(workers), ("small",), VOCAB, 16)
    rig = Rig(rank, None, pipeline, session_groups="two", max_nodes=3, draft_deadline_min_ms=200)
    found = [rig.submit(prompt, tokens=40) for prompt in prompts]
    while not any(rig.scheduler._drafting.mode == ALTERNATING for _ in rig.scheduler.step()):
        pass
    gains: list[set[int]] = []
    for _ in range(4):
        before = [session.num_output for session in found]
        rig.scheduler.step()
        gains.append({at for at, session in enumerate(found) if session.num_output > before[at]})
    assert gains[0] | gains[1] == gains[2] | gains[3] == set(range(5))
    assert not any(one & other for one, other in itertools.pairwise(gains))
    assert max(session.num_output - early for session, early in zip(found, before)) > 1
    before = [session.num_output for session in found]
    rig.submit(range(20, 60), tokens=1)
    rig.scheduler.step()
    assert all(session.num_output > early for session, early in zip(found, before))  # beside a prompt all take part
    rig.run()
    assert [session.tokens for session in found] == [session.tokens for session in wanted]
    assert pipeline.num_sessions == 0


@pytest.mark.parametrize(
    ("draft_s", "whole_s", "half_s", "pays"),
    [(0.02, 0.04, 0.02, True), (0.02, 0.04, 0.04, False), (0.0, 0.04, 0.02, False), (0.2, 0.04, 0.03, False)],
)
def test_two_groups_pay_where_steps_are_bound_by_arithmetic(
    draft_s: float, whole_s: float, half_s: float, pays: bool
) -> None:
    assert alternation_pays(draft_s, whole_s, half_s) is pays


def test_two_groups_are_tried_only_where_they_may_pay(rank: Rank) -> None:
    pipeline = Pipeline(InProcessTransport({}), ("small",), VOCAB, 16)
    pipeline.reply_s = 4.0
    for curve, groups, found in (
        (CostCurve((1, 64), (1.0, 64.0)), "auto", True),
        (CostCurve((1, 64), (1.0, 64.0)), "one", False),
        (FLAT, "auto", False),
        (FLAT, "two", True),
    ):
        rig = Rig(rank, None, pipeline, curve=curve, session_groups=groups, governor="auto")
        may_alternate, one = rig.scheduler._drafting._may_alternate, rig.submit([3])
        assert (may_alternate([one] * 8), may_alternate([one])) == (found, False)


def test_a_modes_speed_counts_the_sessions_that_sit_a_step_out() -> None:
    governor = Governor(EngineConfig(), FLAT)
    spent = RoundSpent(0.0, 1.0, 0.0, 1.0)
    for _ in range(3):
        governor.observe(ALTERNATING, Shape(4, 8, 0, 10.0, sitting_out=4), 12, spent)
        governor.observe(ALTERNATING, Shape(4, 8, 0, 10.0, sitting_out=4), 12, spent)
    assert governor.modes.speed(ALTERNATING) == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize(
    ("wish", "guesses"),
    [({"stages": ("medium",)}, True), ({"stages": ("small",)}, False), ({"max_nodes": 0}, False), ({}, True)],
)
def test_a_local_drafter_serves_the_stage_it_is_of(rank: Rank, wish: dict[str, object], guesses: bool) -> None:
    def next_token(tokens: list[int], ask: object) -> TokenTree:
        return TokenTree.chain([tokens[-1]], stage=Origin.MEDIUM)

    rig = Rig(rank, ScriptedDrafter(next_token, Origin.MEDIUM))
    session = rig.submit([3], **wish)
    rig.run()
    assert (session.stats.drafted > 0) == guesses

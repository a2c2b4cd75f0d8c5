"""The pipeline over a misbehaving transport: deadlines, newest wins, resync, circuit breaker. No engine needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from fakes import InProcessTransport, ScriptedDrafter

from cluster.core.errors import Overloaded
from cluster.core.token_tree import TokenTree
from cluster.core.types import GenerateRequest, Origin, SamplingParams
from cluster.rounds.detokenize import TextStream
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.messages import DraftAsk, DraftReply, StageReport
from cluster.rounds.pipeline import ChainAsk, Pipeline
from cluster.rounds.session import Limits, Session
from cluster.rounds.stage_record import MISSES_TO_OPEN
from drafters.base import Ask

VOCAB = 1000
PATIENCE_S = 5.0  # longer than any reply takes; waiting ends when the reply is there


class SilentDecoder:
    def step(self, token: int) -> str:
        return ""


def session(name: str = "s", prompt: int = 4) -> Session:
    request = GenerateRequest(name, tuple(range(prompt)), SamplingParams(max_tokens=500))
    return Session(request, Limits(10_000, frozenset()), TextStream(SilentDecoder()))


def next_token(tokens: list[int], ask: Ask) -> TokenTree:
    """A tree that tells which state it was made for."""
    return TokenTree.chain([len(tokens)], stage=Origin.SMALL)


def medium_of(tokens: list[int], ask: Ask) -> TokenTree:
    return TokenTree.chain([len(tokens)], stage=Origin.MEDIUM)


def slow(make: Callable[[list[int], Ask], TokenTree], seconds: float) -> Callable[[list[int], Ask], TokenTree]:
    def later(tokens: list[int], ask: Ask) -> TokenTree:
        time.sleep(seconds)
        return make(tokens, ask)

    return later


class LyingWorker(DraftWorker):
    """Sends the same tokens as every tree, whatever its drafter says."""

    def __init__(self, honest: DraftWorker, tokens: list[int]) -> None:
        self._honest, self._tokens = honest, tokens

    def draft(self, verifier: str, asks: Sequence[DraftAsk], upstream: DraftReply | None = None) -> DraftReply:
        reply = self._honest.draft(verifier, asks, upstream)
        lies = {name: TokenTree.chain(self._tokens, 1, tree.key) for name, tree in reply.trees.items()}
        return replace(reply, trees=lies)


class Rig:
    """A pipeline with one worker per stage, and a session that is ready to be asked about."""

    def __init__(self, stages: tuple[str, ...] = ("small", "medium")) -> None:
        makers = {"small": next_token, "medium": medium_of}
        self.drafters = {stage: ScriptedDrafter(makers[stage], vocab_size=VOCAB) for stage in stages}
        self.transport = InProcessTransport({stage: DraftWorker(stage, self.drafters[stage]) for stage in stages})
        self.now = 0.0
        self.pipeline = Pipeline(self.transport, stages, VOCAB, 16, clock=lambda: self.now + time.monotonic())
        self.session = session()
        self.pipeline.open(self.session, stages)
        self.ask()
        self.transport.join()

    def ask(self) -> None:
        self.pipeline.ask([(self.session, self.pipeline.stages, 8)])

    def commit(self, *tokens: int) -> None:
        self.session.advance(tokens, [Origin.TARGET] * len(tokens), 0)

    def round(self, timeout_s: float = PATIENCE_S) -> TokenTree | None:
        """Commit a token, ask, collect."""
        self.commit(7)
        self.ask()
        return self.pipeline.collect([self.session], timeout_s).get(self.session.id)


def test_a_tree_comes_back_for_the_state_it_was_asked_for() -> None:
    rig = Rig()
    for _ in range(5):
        tree = rig.round()
        assert tree is not None
        assert tree.key == rig.session.key
        assert tree.tokens.tolist() == [rig.session.base]
        assert tree.stages.tolist() == [Origin.MEDIUM]


def test_no_round_waits_for_a_drafter_that_does_not_hold_the_session_yet() -> None:
    rig = Rig()
    rig.pipeline.open(other := session("other"), rig.pipeline.stages)
    rig.pipeline.ask([(other, rig.pipeline.stages, 8)])
    start = time.monotonic()
    assert rig.pipeline.collect([other], PATIENCE_S) == {}
    assert time.monotonic() - start < PATIENCE_S / 2
    rig.transport.join()
    rig.pipeline.ask([(other, rig.pipeline.stages, 8)])
    assert other.id in rig.pipeline.collect([other], PATIENCE_S)


def test_a_late_tree_is_not_used_for_another_state() -> None:
    rig = Rig(("small",))
    rig.transport.delay_s = (0.05, 0.05)
    assert rig.round(timeout_s=0.0) is None
    rig.commit(3)
    rig.transport.join()
    assert rig.pipeline.collect([rig.session], 0.0) == {}
    assert rig.pipeline.late == 1


def test_every_second_reply_lost_or_doubled_still_gives_only_right_trees() -> None:
    rig = Rig()
    rig.transport.drop, rig.transport.duplicate, rig.transport.delay_s = 0.3, 0.5, (0.0, 0.01)
    found = 0
    for _ in range(60):
        rig.now += 2.0  # past the breaker's probe interval, so that losses do not end the test early
        tree = rig.round(timeout_s=0.05)
        found += tree is not None
        assert tree is None or tree.key == rig.session.key
    assert found > 10
    for drafter in rig.drafters.values():
        held = drafter.tokens[f"test/{rig.session.id}"]
        assert held == rig.session.tokens[: len(held)]


def test_a_worker_that_lost_the_session_is_sent_it_again() -> None:
    rig = Rig()
    rig.transport.workers["medium"]._end(f"test/{rig.session.id}")
    rig.now += 2.0  # the start was sent a moment ago
    tree = rig.round()  # small still holds it
    assert tree is not None
    assert tree.stages.tolist() == [Origin.SMALL]
    rig.ask()
    rig.transport.join()
    tree = rig.round()
    assert tree is not None
    assert tree.stages.tolist() == [Origin.MEDIUM]


def stages_of(tree: TokenTree | None) -> list[int] | None:
    return None if tree is None else tree.stages.tolist()


def test_a_stage_that_misses_twice_is_left_out_until_a_probe_succeeds() -> None:
    rig = Rig()
    rig.transport.hung = {"medium"}
    for _ in range(MISSES_TO_OPEN):
        assert stages_of(rig.round(timeout_s=0.1)) == [Origin.SMALL]
    assert rig.pipeline.misses["medium"] == MISSES_TO_OPEN
    start = time.monotonic()
    assert stages_of(rig.round()) == [Origin.SMALL]  # and nobody waits for medium
    assert time.monotonic() - start < PATIENCE_S / 2
    rig.transport.hung = set()
    rig.now += 1.5
    rig.round()  # a probe is sent along, not waited for
    rig.transport.join()
    assert stages_of(rig.round()) == [Origin.MEDIUM]


def test_the_stage_that_hangs_is_blamed_and_not_the_one_that_waits_for_it() -> None:
    rig = Rig()
    rig.transport.hung = {"small"}
    for _ in range(MISSES_TO_OPEN):
        assert rig.round(timeout_s=0.1) is None
    assert rig.pipeline.misses == {"small": MISSES_TO_OPEN, "medium": 0}
    assert stages_of(rig.round()) == [Origin.MEDIUM]


def test_a_stage_that_always_answers_late_stays_left_out() -> None:
    rig = Rig(("small",))
    rig.transport.delay_s = (0.1, 0.1)
    for _ in range(MISSES_TO_OPEN):
        rig.round(timeout_s=0.0)
    rig.transport.join()  # both answers have come, too late
    for _ in range(3):
        rig.now += 1.5
        rig.round(timeout_s=0.0)  # probed
        rig.transport.join()
    assert rig.pipeline.misses["small"] == MISSES_TO_OPEN
    rig.transport.delay_s = (0.0, 0.0)
    rig.now += 1.5
    rig.round(timeout_s=PATIENCE_S)
    rig.now += 1.5
    rig.round(timeout_s=PATIENCE_S)
    rig.transport.join()
    assert stages_of(rig.round()) == [Origin.SMALL]


def test_a_probe_is_not_used_up_by_a_round_that_asks_nobody() -> None:
    rig = Rig(("small",))
    rig.transport.hung = {"small"}
    for _ in range(MISSES_TO_OPEN):
        rig.round(timeout_s=0.02)
    rig.transport.hung = set()
    rig.now += 1.5
    rig.pipeline.ask([])  # the governor wants no remote trees in this round
    rig.round()
    rig.transport.join()
    assert stages_of(rig.round()) == [Origin.SMALL]


def test_a_dead_stage_is_noticed_at_once() -> None:
    rig = Rig()
    rig.transport.dead = {"medium"}
    start = time.monotonic()
    assert stages_of(rig.round()) == [Origin.SMALL]
    assert time.monotonic() - start < PATIENCE_S / 2
    assert rig.pipeline.misses["medium"] == 1


def test_confirming_a_start_does_not_end_the_wait_for_another_stages_tree() -> None:
    rig = Rig()
    rig.pipeline._sessions[rig.session.id].held.pop("medium")
    rig.now += 1.5
    rig.drafters["small"].make = slow(next_token, 0.1)
    assert stages_of(rig.round()) == [Origin.SMALL]


def test_a_session_that_a_worker_refuses_is_not_sent_to_it_in_every_round() -> None:
    rig = Rig(("small",))
    starts = []

    def refuse(session_id: str, *rest: object) -> None:
        starts.append(session_id)
        raise Overloaded("full")

    rig.drafters["small"].begin = refuse  # type: ignore[method-assign]
    rig.pipeline.open(other := session("other"), rig.pipeline.stages)
    for _ in range(10):
        rig.pipeline.ask([(other, rig.pipeline.stages, 8)])
        rig.transport.join()
    assert len(starts) == 1
    rig.now += 1.5
    rig.pipeline.ask([(other, rig.pipeline.stages, 8)])
    rig.transport.join()
    assert len(starts) == 2


def test_what_a_worker_still_holds_of_an_earlier_session_of_the_same_name_does_no_harm() -> None:
    rig = Rig()
    rig.commit(1, 2, 3, 4, 5, 6)
    rig.round()
    late = [
        DraftReply({}, (StageReport(stage, 1, {rig.session.id: rig.session.base}),)) for stage in ("small", "medium")
    ]
    rig.transport.close = lambda session_id: None  # type: ignore[method-assign]
    rig.pipeline.close(rig.session.id)  # the workers do not hear of it yet
    rig.session = session()
    rig.pipeline.open(rig.session, rig.pipeline.stages)
    for reply in late:
        rig.pipeline._deliver(reply)
    rig.ask()
    rig.transport.join()
    assert stages_of(rig.round()) == [Origin.MEDIUM]


def test_a_worker_that_claims_to_hold_more_than_there_is_is_not_believed() -> None:
    rig = Rig(("small",))
    rig.pipeline._deliver(DraftReply({}, (StageReport("small", 1, {rig.session.id: 10**9}),)))
    assert stages_of(rig.round()) == [Origin.SMALL]


def test_both_stages_recover_although_each_was_probed_while_the_other_was_broken() -> None:
    rig = Rig()
    rig.transport.dead = {"small", "medium"}
    for _ in range(6):
        rig.round()
    assert rig.round() is None
    rig.transport.dead = set()
    for _ in range(4):
        rig.now += 1.5
        rig.round()
        rig.transport.join()
    tree = rig.round()
    assert tree is not None
    assert tree.stages.tolist() == [Origin.MEDIUM]


@pytest.mark.parametrize("tokens", [[VOCAB], [-1], list(range(17))])
def test_a_tree_that_breaks_the_rules_is_refused(tokens: list[int]) -> None:
    rig = Rig(("small",))
    rig.transport.workers["small"] = LyingWorker(rig.transport.workers["small"], tokens)
    assert rig.round() is None
    assert rig.pipeline.stats()["small"].refused_trees == 1


def test_replies_for_unknown_sessions_and_stages_are_ignored() -> None:
    rig = Rig()
    key = session("gone").key
    rig.pipeline._deliver(DraftReply({"gone": TokenTree.chain([1], key=key)}, (StageReport("large", 1, {"gone": 3}),)))
    assert rig.round() is not None


def test_stages_are_asked_in_chain_order_and_those_that_are_not_there_are_not() -> None:
    rig = Rig()
    rig.commit(7)
    rig.pipeline.ask([(rig.session, ("large", "medium", "small"), 8)])
    (tree,) = rig.pipeline.collect([rig.session], PATIENCE_S).values()
    assert stages_of(tree) == [Origin.MEDIUM]


def test_close_first_tells_the_rest_of_the_text_to_stages_that_follow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.commit(7, 8)
    told: list[object] = []
    monkeypatch.setattr(rig.transport, "draft", lambda chains, deliver, fail: told.extend(chains))
    monkeypatch.setattr(rig.transport, "close", told.append)
    rig.pipeline.close(rig.session.id)
    small, medium, closed = told
    assert closed == rig.session.id
    for stage, chain in (("small", small), ("medium", medium)):
        assert isinstance(chain, ChainAsk)
        assert list(chain.asks) == [stage]
        assert chain.asks[stage].commit.token_ids == (7, 8)
        assert chain.asks[stage].max_nodes == 0


def test_close_frees_the_session_everywhere() -> None:
    rig = Rig()
    rig.pipeline.close(rig.session.id)
    rig.pipeline.close(rig.session.id)
    rig.transport.join()
    assert rig.pipeline.num_sessions == 0
    assert all(drafter.tokens == {} for drafter in rig.drafters.values())


def long_chain(tokens: list[int], ask: Ask) -> TokenTree:
    """What ``commit(7)`` will bring for many rounds."""
    return TokenTree.chain([7] * min(ask.max_nodes, ask.max_depth), stage=Origin.SMALL)


def ahead_rig(make: Callable[[list[int], Ask], TokenTree], run_ahead: int) -> Rig:
    rig = Rig(("small",))
    rig.drafters["small"].make = make
    rig.pipeline = Pipeline(
        rig.transport, ("small",), VOCAB, 16, clock=lambda: rig.now + time.monotonic(), run_ahead=run_ahead
    )
    rig.pipeline.open(rig.session, ("small",))
    rig.ask()
    rig.transport.join()
    rig.ask()
    assert rig.pipeline.collect([rig.session], PATIENCE_S)
    return rig


def test_a_tree_that_foresaw_the_outcome_is_the_next_rounds_tree_without_a_wait() -> None:
    rig = ahead_rig(long_chain, run_ahead=8)
    rig.transport.delay_s = (0.2, 0.2)
    rig.commit(7, 7)
    rig.ask()
    tree = rig.pipeline.collect([rig.session], 0.0)[rig.session.id]
    assert tree.key == rig.session.key
    assert tree.tokens.tolist() == [7] * (8 + 8 - 2)
    assert (rig.pipeline.wanted, rig.pipeline.cached, rig.pipeline.missing) == (2, 1, 0)
    assert rig.pipeline.misses["small"] == 0


def test_an_outcome_that_no_tree_foresaw_waits_for_a_fresh_one() -> None:
    rig = ahead_rig(long_chain, run_ahead=8)
    rig.transport.delay_s = (0.05, 0.05)
    rig.commit(3)
    rig.ask()
    assert rig.pipeline.collect([rig.session], 0.0) == {}
    rig.commit(3)
    rig.ask()
    assert len(rig.pipeline.collect([rig.session], PATIENCE_S)[rig.session.id]) == 16
    assert rig.pipeline.cached == 0


def test_a_tree_that_comes_while_the_target_verifies_serves_the_round_after() -> None:
    rig = ahead_rig(long_chain, run_ahead=8)
    rig.transport.delay_s = (0.05, 0.05)
    for foreseen in range(1, 10):
        rig.commit(7)
        rig.ask()
        tree = rig.pipeline.collect([rig.session], 0.0)[rig.session.id]  # nobody waits, ever
        assert tree.tokens.tolist() == [7] * 15
        assert rig.pipeline.cached == foreseen
        rig.transport.join()


def test_without_run_ahead_no_tree_is_used_for_another_state() -> None:
    rig = ahead_rig(long_chain, run_ahead=0)
    rig.transport.delay_s = (0.05, 0.05)
    rig.commit(7)
    rig.ask()
    assert rig.pipeline.collect([rig.session], 0.0) == {}


def waste(rig: Rig) -> dict[str, int]:
    return {stage: stats.wasted_nodes for stage, stats in rig.pipeline.stats().items()}


def test_the_breakers_state_is_told_and_how_often_it_opened() -> None:
    rig = Rig(("small",))
    rig.transport.hung = {"small"}
    states = []
    for _ in range(MISSES_TO_OPEN):
        states.append(rig.pipeline.stats()["small"].breaker_open)
        rig.round(timeout_s=0.02)
    stats = rig.pipeline.stats()["small"]
    assert (states, stats.breaker_open, stats.breaker_openings) == ([False] * MISSES_TO_OPEN, True, 1)
    rig.transport.hung = set()
    rig.now += 1.5
    rig.round()
    rig.transport.join()
    stats = rig.pipeline.stats()["small"]
    assert (stats.breaker_open, stats.breaker_openings) == (False, 1)


def test_a_tree_is_late_once_its_round_began_without_it_and_counts_for_its_own_stage() -> None:
    rig = Rig()
    rig.drafters["medium"].make = slow(medium_of, 0.1)
    assert stages_of(rig.round(timeout_s=0.05)) == [Origin.SMALL]
    rig.transport.join()
    late = {stage: stats.late_trees for stage, stats in rig.pipeline.stats().items()}
    assert late == {"small": 0, "medium": 1}
    assert rig.pipeline.late == 1


def test_a_tree_that_nobody_had_to_wait_for_is_not_late() -> None:
    rig = ahead_rig(long_chain, run_ahead=8)
    rig.commit(7)
    rig.ask()
    rig.pipeline.collect([rig.session], PATIENCE_S)  # from the cache; the fresh tree comes afterwards, well in time
    rig.transport.join()
    assert rig.pipeline.late == 0


@pytest.mark.parametrize("forge", ["none", "ahead", "other session", "other epoch", "other digest"])
def test_a_tree_on_a_state_that_its_session_never_was_in_is_refused_and_never_looked_up(forge: str) -> None:
    rig = ahead_rig(long_chain, run_ahead=8)
    key = rig.session.key
    forged = {
        "none": None,
        "ahead": replace(key, base=key.base + 1),
        "other session": session("other").key,
        "other epoch": replace(key, epoch=9),
        "other digest": replace(key, digest=key.digest ^ 1),
    }[forge]
    newest = rig.pipeline._sessions[rig.session.id].newest
    lie = TokenTree.chain([7] * 8, Origin.SMALL, forged)
    rig.pipeline._deliver(DraftReply({rig.session.id: lie}, (StageReport("small", 1, {}),)))
    assert rig.pipeline.stats()["small"].refused_trees == 1
    assert rig.pipeline._sessions[rig.session.id].newest is newest


def test_nodes_that_no_step_verified_are_wasted_once_a_newer_tree_takes_their_place() -> None:
    rig = Rig(("small",))
    rig.drafters["small"].make = lambda tokens, ask: TokenTree.chain([7, 7, 7], Origin.SMALL)
    tree = rig.round()
    assert tree is not None
    rig.pipeline.verified(rig.session.id, tree.prune(2))
    assert waste(rig) == {"small": 0}
    tree = rig.round()
    assert tree is not None
    assert waste(rig) == {"small": 1}
    rig.pipeline.verified(rig.session.id, tree)
    assert rig.round() is not None
    assert waste(rig) == {"small": 1}
    rig.pipeline.close(rig.session.id)  # the session moves on for good: its last tree was for nothing
    assert waste(rig) == {"small": 1 + 3}


def test_a_states_trees_from_two_stages_are_wasted_once_by_who_guessed_the_nodes() -> None:
    rig = Rig()
    rig.drafters["small"].make = lambda tokens, ask: TokenTree.chain([7], Origin.SMALL)
    both = TokenTree.build([7, 8, 9], [-1, 0, 1], stages=[1, 2, 2])
    rig.drafters["medium"].make = lambda tokens, ask: both
    assert rig.round() is not None
    assert rig.round() is not None
    assert waste(rig) == {"small": 1, "medium": 2}


def test_trees_for_a_session_that_has_ended_are_late_and_wasted() -> None:
    rig = Rig(("small",))
    key = rig.session.key
    rig.pipeline.close(rig.session.id)
    tree = TokenTree.chain([7, 8], Origin.SMALL, key)
    rig.pipeline._deliver(DraftReply({rig.session.id: tree}, (StageReport("small", 1, {}),)))
    assert rig.pipeline.late == 1
    assert waste(rig) == {"small": 2}


def test_a_trees_age_is_the_time_from_its_arrival_to_the_round_that_takes_it() -> None:
    rig = ahead_rig(long_chain, run_ahead=8)
    before = rig.pipeline.stats()["small"].draft_age
    rig.transport.delay_s = (0.2, 0.2)
    rig.commit(7)
    rig.now += 1.5  # the cached tree waits for so long
    rig.ask()
    rig.pipeline.collect([rig.session], 0.0)
    age = rig.pipeline.stats()["small"].draft_age
    assert sum(age.counts) == sum(before.counts) + 1
    assert 1.5 <= age.total - before.total < 1.5 + PATIENCE_S
    assert age.counts[age.bounds.index(2.0)] == 1


@pytest.mark.parametrize(("seconds", "busy"), [(0.25, 0.25), (-1.0, 0.0), (float("nan"), 0.0), (float("inf"), 0.0)])
def test_computing_time_is_what_workers_say_within_reason(seconds: float, busy: float) -> None:
    rig = Rig(("small",))
    before = rig.pipeline.stats()["small"]
    rig.pipeline._deliver(DraftReply({}, (StageReport("small", 1, {}, (), seconds),)))
    after = rig.pipeline.stats()["small"]
    assert after.answers == before.answers + 1
    assert after.busy_s - before.busy_s == pytest.approx(busy)

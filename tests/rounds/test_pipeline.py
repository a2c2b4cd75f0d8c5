"""The pipeline over a misbehaving transport: deadlines, newest wins, resync, circuit breaker. No engine needed."""

from __future__ import annotations

import time

import pytest
from pipeline_rig import PATIENCE_S, VOCAB, LyingWorker, Rig, next_token, session, slow, stages_of

from cluster.core.errors import Overloaded
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin
from cluster.rounds.breaker import MISSES_TO_OPEN
from cluster.rounds.messages import DraftReply, StageReport
from cluster.rounds.pipeline import LEASE_INTERVAL_S, ChainAsk

WORKER = "one that answers"


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


def test_the_stage_that_hangs_is_blamed_where_rounds_go_on_and_another_stage_answers() -> None:
    rig = Rig()
    rig.transport.hung = {"medium"}
    for _ in range(2 * MISSES_TO_OPEN):
        rig.commit(7)
        rig.ask()
        rig.transport.join()
        rig.now += 1.0
        rig.pipeline.collect([rig.session], 0.0, late_after_s=1.5)
    assert rig.pipeline.misses == {"small": 0, "medium": MISSES_TO_OPEN}


def test_a_call_that_fails_after_another_does_not_have_the_round_wait_again() -> None:
    rig = Rig()
    rig.transport.hung = {"small", "medium"}
    rig.ask()
    rig.pipeline._sessions[rig.session.id].chain.pop("medium")  # which was sent a start only
    assert rig.pipeline.awaits(rig.session.id, PATIENCE_S)
    for stage in ("small", "medium"):
        rig.pipeline._failed(stage, rig.transport.workers[stage], [rig.session.id])
        assert not rig.pipeline.awaits(rig.session.id, PATIENCE_S)


def test_the_failed_call_of_a_worker_that_the_session_has_no_more_ends_no_waiting() -> None:
    rig = Rig(("small",))
    rig.transport.hung = {"small"}
    rig.ask()
    rig.pipeline._failed("small", WORKER, [rig.session.id])
    assert rig.pipeline.awaits(rig.session.id, PATIENCE_S)


def test_how_long_replies_take_is_told_by_the_last_stage_that_was_asked() -> None:
    rig = Rig()
    rig.commit(7)
    rig.pipeline.ask([(rig.session, ("small",), 8)])
    assert rig.pipeline.collect([rig.session], PATIENCE_S)
    assert rig.pipeline.reply_s > 0.0


def test_an_answer_to_a_sessions_first_ask_being_a_probe_is_timed_like_any_other() -> None:
    rig = Rig(("small",))
    rig.transport.hung = {"small"}
    for _ in range(MISSES_TO_OPEN):
        rig.round(timeout_s=0.01)
    rig.transport.hung = set()
    other = session("other")
    rig.pipeline.open(other, rig.pipeline.stages)
    for _ in range(2):  # a probe that is its start, and one that is its first ask
        rig.now += 1.5
        rig.pipeline.collect([other], 0.0)  # with no patience the answers come too late to close the breaker
        rig.pipeline.ask([(other, rig.pipeline.stages, 8)])
        rig.transport.join()
    assert other.id in rig.pipeline._sessions
    assert rig.pipeline._sessions[other.id].newest is not None
    assert 0.0 <= rig.pipeline.reply_s < 10.0


def test_a_lost_lease_is_asked_for_again_but_not_in_every_round() -> None:
    rig = Rig(("small",))
    opened: list[str] = []
    rig.transport.open = lambda name, stages: opened.append(name)  # type: ignore[method-assign]
    for _ in range(5):
        rig.pipeline.lease(rig.session.id, rig.pipeline.stages)
    assert opened == []
    rig.now += LEASE_INTERVAL_S
    rig.pipeline.lease(rig.session.id, rig.pipeline.stages)
    assert opened == []  # it has its worker
    rig.transport.close(rig.session.id)
    for _ in range(5):
        rig.pipeline.lease(rig.session.id, rig.pipeline.stages)
    assert opened == [rig.session.id]


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
        rig.pipeline._deliver(WORKER, reply)
    rig.ask()
    rig.transport.join()
    assert stages_of(rig.round()) == [Origin.MEDIUM]


def test_a_worker_that_claims_to_hold_more_than_there_is_is_not_believed() -> None:
    rig = Rig(("small",))
    rig.pipeline._deliver(WORKER, DraftReply({}, (StageReport("small", 1, {rig.session.id: 10**9}),)))
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
    rig.pipeline._deliver(
        WORKER, DraftReply({"gone": TokenTree.chain([1], key=key)}, (StageReport("large", 1, {"gone": 3}),))
    )
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


@pytest.mark.parametrize("length", [2.5, -1, True, "3", None])
def test_a_worker_that_names_an_impossible_length_costs_nobody_anything(length: object) -> None:
    rig = Rig(("small",))
    rig.commit(7)
    rig.pipeline._deliver(WORKER, DraftReply({}, (StageReport("small", 1, {rig.session.id: length}),)))  # type: ignore[dict-item]
    assert stages_of(rig.round()) == [Origin.SMALL]

"""What a target counts of its remote stages: breakers, late, refused and wasted drafts, their age."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pipeline_rig import PATIENCE_S, Rig, ahead_rig, long_chain, medium_of, session, slow, stages_of

from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin
from cluster.rounds.breaker import MISSES_TO_OPEN
from cluster.rounds.messages import DraftReply, StageReport

WORKER = "one that answers"


def waste(rig: Rig) -> dict[str, int]:
    return {stage: stats.wasted_nodes for stage, stats in rig.pipeline.stats().items()}


def test_the_breakers_state_is_told_and_how_often_it_opened() -> None:
    rig = Rig(("small",))
    rig.transport.hung = {"small"}
    states = []
    for _ in range(MISSES_TO_OPEN):
        states.append(rig.pipeline.stats()["small"].breakers_open)
        rig.round(timeout_s=0.02)
    stats = rig.pipeline.stats()["small"]
    assert (states, stats.breakers_open, stats.breaker_openings) == ([0] * MISSES_TO_OPEN, 1, 1)
    rig.transport.hung = set()
    rig.now += 1.5
    rig.round()
    rig.transport.join()
    stats = rig.pipeline.stats()["small"]
    assert (stats.breakers_open, stats.breaker_openings) == (0, 1)


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
    rig.pipeline._deliver(WORKER, DraftReply({rig.session.id: lie}, (StageReport("small", 1, {}),)))
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
    rig.pipeline._deliver(WORKER, DraftReply({rig.session.id: tree}, (StageReport("small", 1, {}),)))
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
    rig.pipeline._deliver(WORKER, DraftReply({}, (StageReport("small", 1, {}, (), seconds),)))
    after = rig.pipeline.stats()["small"]
    assert after.answers == before.answers + 1
    assert after.busy_s - before.busy_s == pytest.approx(busy)

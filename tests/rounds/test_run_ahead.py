"""Run-ahead: a tree that foresaw the outcome serves the next round."""

from __future__ import annotations

from pipeline_rig import PATIENCE_S, ahead_rig, long_chain


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

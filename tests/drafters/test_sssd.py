"""SSSD's trees: scores, order and limits of reference/seeds.md's description, by hand and on random text."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from cluster.core.errors import Overloaded, UnknownSession
from cluster.core.types import Origin, SamplingParams
from drafters.base import Ask
from drafters.options import SssdOptions
from drafters.sssd import SssdDrafter, branch_depth

PARAMS = SamplingParams()


def drafter_of(text: list[int], **options: int) -> SssdDrafter:
    drafter = SssdDrafter(SssdOptions(**options), max_sessions=2)
    drafter.begin("s", text, PARAMS, len(text))
    return drafter


def test_a_repetition_is_guessed_with_the_discounted_share_of_its_occurrences() -> None:
    # After 1 2 came 3 twice and 4 once. The longest match, 2 tokens, decays by 0.8 per level; a match of 1 by 0.7.
    text = [1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2]
    tree = drafter_of(text).propose([Ask("s", 5, 9)], {})["s"]
    assert list(zip(tree.parents.tolist(), tree.tokens.tolist())) == [(-1, 3), (-1, 4), (0, 7), (0, 8), (1, 9)]
    third = 0.6 / 3
    assert tree.scores == pytest.approx([2 * third, third, 0.8 * third, 0.8 * third, 0.8 * third])
    assert set(tree.stages.tolist()) == {Origin.SMALL}


def test_a_match_that_ended_the_window_is_continued_by_shorter_ones() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4]
    tree = drafter_of(text, window=6).propose([Ask("s", 20, 20)], {})["s"]
    assert tree.tokens.tolist() == [5, 6, 7, 8, 9]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3]


@pytest.mark.parametrize("alphabet", [2, 4, 20])
@pytest.mark.parametrize("max_nodes", [1, 3, 7, 31, 60])
def test_trees_on_random_text_keep_every_limit(alphabet: int, max_nodes: int) -> None:
    rng = np.random.default_rng(alphabet)
    drafter = drafter_of(rng.integers(0, alphabet, 300).tolist())
    for max_depth in (1, 2, 30):
        drafter.commit("s", rng.integers(0, alphabet, 3).tolist())
        tree = drafter.propose([Ask("s", max_nodes, max_depth)], {})["s"]
        tree.check(alphabet, max_nodes, min(max_depth, branch_depth(max_nodes + 1)))
        places = list(zip(tree.parents.tolist(), tree.tokens.tolist()))
        assert len(set(places)) == len(places)
        assert max(np.bincount(tree.parents + 1)) <= min(5, max_nodes)
        assert tree.scores[0] <= np.float32(0.6)
        assert np.all(np.diff(tree.scores) <= 0)
        above = np.append(tree.scores, np.float32(1.0))[tree.parents]
        assert np.all(tree.scores <= above)


def test_a_budget_is_filled_where_the_text_has_enough_to_say() -> None:
    text = np.random.default_rng(0).integers(0, 3, 500).tolist()
    assert len(drafter_of(text).propose([Ask("s", 24, 24)], {})["s"]) == 24


def test_the_depth_follows_the_budget() -> None:
    assert [branch_depth(length) for length in (2, 5, 6, 8, 9, 32, 33, 48, 49)] == [1, 4, 5, 5, 6, 6, 8, 8, 10]


def test_text_that_repeats_nothing_gives_no_tree() -> None:
    assert drafter_of(list(range(50))).propose([Ask("s", 8, 8)], {}) == {}


def test_commits_in_any_pieces_give_the_tree_of_a_session_begun_with_the_whole_text() -> None:
    rng = np.random.default_rng(5)
    text = rng.integers(0, 4, 200).tolist()
    drafter = drafter_of(text[:20])
    done = 20
    while done < len(text):
        step = int(rng.integers(1, 7))
        drafter.commit("s", text[done : done + step])
        done = min(len(text), done + step)
        fresh = drafter_of(text[:done])
        mine, theirs = (each.propose([Ask("s", 12, 12)], {})["s"] for each in (drafter, fresh))
        assert mine.tokens.tolist() == theirs.tokens.tolist()
        assert mine.scores.tolist() == theirs.scores.tolist()


def test_begin_on_a_held_session_replaces_it() -> None:
    drafter = drafter_of([1, 2, 1])
    drafter.begin("s", [5, 6, 5], PARAMS, 3)
    assert drafter.propose([Ask("s", 1, 1)], {})["s"].tokens.tolist() == [6]


def test_unknown_sessions_are_named_and_ending_one_does_nothing() -> None:
    drafter = drafter_of([1, 2, 1])
    drafter.end("other")
    drafter.end("s")
    with pytest.raises(UnknownSession, match="'s'"):
        drafter.propose([Ask("s", 1, 1)], {})
    with pytest.raises(UnknownSession, match="'s'"):
        drafter.commit("s", [1])


def test_one_session_too_many_is_refused_and_an_ended_one_makes_room() -> None:
    drafter = drafter_of([1])
    drafter.begin("t", [1], PARAMS, 1)
    with pytest.raises(Overloaded):
        drafter.begin("u", [1], PARAMS, 1)
    drafter.end("t")
    drafter.begin("u", [1], PARAMS, 1)


def test_a_worker_that_runs_sssd_alone_never_loads_torch() -> None:
    program = (
        "import sys; from pathlib import Path; from cluster.core.config import StageConfig;"
        "from drafters import TargetFacts, create;"
        "create(StageConfig(name='small', drafter='sssd'), target=TargetFacts(10, 100, Path('none')));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})

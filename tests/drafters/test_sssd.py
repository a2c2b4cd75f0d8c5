"""SSSD's trees: scores, order and limits, by hand and on random text; the compiled form equals the readable one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from cluster.core.errors import Overloaded, UnknownSession
from cluster.core.native_build import NativeUnavailable
from cluster.core.types import Origin, SamplingParams
from cluster.rounds.chain_drafter import best_chain
from drafters import sssd
from drafters.base import Ask
from drafters.datastore import Datastore
from drafters.live_store import LiveStores
from drafters.ngram_tree import PlainIndex, Rules, SessionIndex
from drafters.options import SssdOptions
from drafters.sssd import SssdDrafter
from drafters.sssd_native import NativeIndex, library

PARAMS = SamplingParams()
RULES = Rules(query=4, samples=8, own_weight=3.0, store_cap=10.0, prior=2.0, negligible=0.0)


@pytest.fixture(params=[PlainIndex, NativeIndex], ids=["plain", "native"])
def kind(request: pytest.FixtureRequest) -> Callable[[Rules], SessionIndex]:
    if request.param is NativeIndex:
        try:
            library()
        except NativeUnavailable as error:
            pytest.skip(str(error))
    chosen: Callable[[Rules], SessionIndex] = request.param
    return chosen


@pytest.fixture
def new(kind: Callable[[Rules], SessionIndex], monkeypatch: pytest.MonkeyPatch) -> Callable[..., SssdDrafter]:
    monkeypatch.setattr(sssd, "_index_kind", lambda: kind)

    def make(text: list[int], store: Datastore | None = None, rules: Rules = RULES, **options: int) -> SssdDrafter:
        drafter = SssdDrafter(SssdOptions(**options), max_sessions=2, store=store, rules=rules)
        drafter.begin("s", text, PARAMS, len(text))
        return drafter

    return make


def test_a_runs_share_grows_with_its_occurrences_and_the_rest_is_left_to_shorter_runs(
    new: Callable[..., SssdDrafter],
) -> None:
    # After 1 2 came 3 twice and 4 once, after 2 alone 5 as well.
    text = [1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 4, 9, 2, 5, 1, 2]
    tree = new(text).propose([Ask("s", 3, 1)], {})["s"]
    longer, left = 1 / (3 * 3 + 2), 2 / (3 * 3 + 2)
    shorter = left / (3 * 4 + 2)
    assert tree.tokens.tolist() == [3, 4, 5]
    assert tree.parents.tolist() == [-1, -1, -1]
    assert tree.scores == pytest.approx([6 * longer + 6 * shorter, 3 * longer + 3 * shorter, 3 * shorter])
    assert set(tree.stages.tolist()) == {Origin.SMALL}


def test_a_store_speaks_where_the_text_is_silent_and_its_commonest_tokens_fill_what_is_left(
    new: Callable[..., SssdDrafter],
) -> None:
    store = Datastore.of([[1, 2, 3, 4], [1, 2, 3, 5], [6, 6, 6, 6]], 10)
    tree = new([9, 1, 2], store).propose([Ask("s", 4, 2)], {})["s"]
    assert tree.tokens[0] == 3
    assert tree.parents.tolist()[1:3] == [0, 0]
    assert sorted(tree.tokens.tolist()[1:3]) == [4, 5]
    # Two runs, 1 2 and 2, were followed by 3 both times; 3 also is 2 of the text's 15 tokens.
    rest = (2 / 4) ** 2
    assert tree.scores[0] == pytest.approx(2 / 4 + (2 / 4) * (2 / 4) + rest * 2 / 15)
    assert tree.tokens[3] == 6


def test_a_stores_many_occurrences_do_not_drown_the_sessions_own(new: Callable[..., SssdDrafter]) -> None:
    store = Datastore.of([[1, 2]] * 500, 10)
    tree = new([1, 3, 7, 1], store).propose([Ask("s", 3, 1)], {})["s"]
    scores = dict(zip(tree.tokens.tolist(), tree.scores.tolist()))
    assert scores[3] == pytest.approx(3 / (3 + 10 + 2))
    assert scores[2] > 10 / (3 + 10 + 2)


def test_a_path_goes_on_where_the_text_it_began_in_ends(new: Callable[..., SssdDrafter]) -> None:
    tree = new([5, 6, 7, 8, 1, 2, 3, 4, 5, 9, 1, 2], query=4).propose([Ask("s", 40, 8)], {})["s"]
    assert tree.tokens.tolist()[:3] == [3, 4, 5]
    behind_5 = [token for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist()) if parent == 2]
    assert sorted(behind_5) == [6, 9]


@pytest.mark.parametrize("alphabet", [2, 4, 20])
@pytest.mark.parametrize("max_nodes", [1, 3, 7, 31, 60])
def test_trees_on_random_text_keep_every_limit(new: Callable[..., SssdDrafter], alphabet: int, max_nodes: int) -> None:
    rng = np.random.default_rng(alphabet)
    drafter = new(rng.integers(0, alphabet, 300).tolist(), rules=Rules())
    for max_depth in (1, 2, 30):
        drafter.commit("s", rng.integers(0, alphabet, 3).tolist())
        tree = drafter.propose([Ask("s", max_nodes, max_depth)], {})["s"]
        tree.check(alphabet, max_nodes, max_depth)
        places = list(zip(tree.parents.tolist(), tree.tokens.tolist()))
        assert len(set(places)) == len(places)
        assert np.all(np.diff(tree.scores) <= 0)
        above = np.append(tree.scores, np.float32(1.0))[tree.parents]
        assert np.all(tree.scores <= above)


def test_a_larger_budget_adds_nodes_and_changes_none(new: Callable[..., SssdDrafter]) -> None:
    rng = np.random.default_rng(0)
    store = Datastore.of([rng.integers(0, 6, 50).tolist() for _ in range(20)], 6)
    drafter = new(rng.integers(0, 6, 200).tolist(), store)
    large = drafter.propose([Ask("s", 40, 40)], {})["s"]
    assert len(large) == 40
    for size in (1, 5, 17):
        small = drafter.propose([Ask("s", size, 40)], {})["s"]
        assert small.tokens.tolist() == large.tokens.tolist()[:size]
        assert small.parents.tolist() == large.parents.tolist()[:size]


def test_nodes_below_the_least_score_are_left_out_and_no_likely_ones(new: Callable[..., SssdDrafter]) -> None:
    rng = np.random.default_rng(0)
    store = Datastore.of([rng.integers(0, 6, 50).tolist() for _ in range(20)], 6)
    drafter = new(rng.integers(0, 6, 200).tolist(), store)
    whole = drafter.propose([Ask("s", 40, 40)], {})["s"]
    some = drafter.propose([Ask("s", 40, 40, min_score=0.02)], {})["s"]
    assert len(some) < len(whole)
    assert some.scores.min() >= 0.02
    paths = {tuple(some.tokens[some.path(node)].tolist()) for node in range(len(some))}
    likely = np.flatnonzero(whole.scores >= 0.04).tolist()  # shorter runs, left out too, have less to say than 0.02
    assert likely
    assert all(tuple(whole.tokens[whole.path(node)].tolist()) in paths for node in likely)
    assert drafter.propose([Ask("s", 40, 40, min_score=0.999)], {}) == {}


def test_a_chain_is_the_trees_likeliest_path(new: Callable[..., SssdDrafter]) -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(0, 6, 200).tolist()
    store = Datastore.of([rng.integers(0, 6, 50).tolist() for _ in range(20)], 6)
    tree = new(text, store).propose([Ask("s", 200, 4)], {})["s"]
    chain = new(text, store, rules=replace(RULES, chain=True)).propose([Ask("s", 4, 8)], {})["s"]
    assert chain.parents.tolist() == [-1, 0, 1, 2]
    likeliest = best_chain(tree, 4)
    assert chain.tokens.tolist() == likeliest.tokens.tolist()
    assert chain.scores.tolist() == likeliest.scores.tolist()


@pytest.mark.parametrize("rules", [RULES, replace(RULES, chain=True)], ids=["tree", "chain"])
@pytest.mark.parametrize("alphabet", [2, 5, 30, 500])
@pytest.mark.parametrize("num_stores", [0, 1, 2])
def test_the_compiled_form_gives_the_readable_ones_trees(alphabet: int, num_stores: int, rules: Rules) -> None:
    try:
        native = NativeIndex(rules)
    except NativeUnavailable as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(alphabet)
    texts = [rng.integers(0, alphabet, 200).tolist() for _ in range(20)]
    stores = [Datastore.of(texts, alphabet + 3), Datastore.of(texts[:3], 70_000)][:num_stores]
    plain = PlainIndex(rules)
    for _ in range(30):
        piece = rng.integers(0, alphabet + 1, int(rng.integers(1, 9))).tolist()
        plain.extend(piece)
        native.extend(piece)
        for outcomes, min_score in ((False, 0.0), (True, 0.0), (False, 0.03)):
            ours = plain.grow(stores, 16, 6, 1, outcomes, min_score)
            theirs = native.grow(stores, 16, 6, 1, outcomes, min_score)
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            assert ours.parents.tolist() == theirs.parents.tolist()
            assert ours.scores.tolist() == theirs.scores.tolist()


def test_a_tree_of_outcomes_is_wide_along_its_best_path_alone(new: Callable[..., SssdDrafter]) -> None:
    rng = np.random.default_rng(3)
    drafter = new(rng.choice(6, 400, p=[0.6, 0.2, 0.1, 0.05, 0.03, 0.02]).tolist(), rules=Rules())
    tree = drafter.propose([Ask("s", 60, 8, outcomes=True)], {})["s"]
    tree.check(6)
    parents = tree.parents.tolist()
    children = {node: [c for c, parent in enumerate(parents) if parent == node] for node in range(-1, len(tree))}
    path = [-1]
    while children[path[-1]]:
        path.append(max(children[path[-1]], key=lambda node: tree.scores[node]))
    beside = set(range(len(tree))) - set(path)
    assert all(len(children[node]) <= 1 for node in beside)
    outcomes = [node for node in beside if parents[node] in path]
    assert len(outcomes) > 15
    # All but the deepest have something below them, and the last one, for which there was no room.
    assert sum(not children[node] for node in outcomes if tree.depths()[node] < 8) <= 1


def test_text_that_repeats_nothing_gives_no_tree(new: Callable[..., SssdDrafter]) -> None:
    assert new(list(range(50))).propose([Ask("s", 8, 8)], {}) == {}


def test_commits_in_any_pieces_give_the_tree_of_a_session_begun_with_the_whole_text(
    new: Callable[..., SssdDrafter],
) -> None:
    rng = np.random.default_rng(5)
    text = rng.integers(0, 4, 200).tolist()
    drafter = new(text[:20])
    done = 20
    while done < len(text):
        step = int(rng.integers(1, 7))
        drafter.commit("s", text[done : done + step])
        done = min(len(text), done + step)
        fresh = new(text[:done])
        mine, theirs = (each.propose([Ask("s", 12, 12)], {})["s"] for each in (drafter, fresh))
        assert mine.tokens.tolist() == theirs.tokens.tolist()
        assert mine.scores.tolist() == theirs.scores.tolist()


def test_a_session_forgets_its_oldest_text_beyond_the_limit(new: Callable[..., SssdDrafter]) -> None:
    drafter = new([1, 2, 3] * 20, max_tokens=64)
    assert drafter.propose([Ask("s", 1, 1)], {})["s"].tokens.tolist() == [1]
    drafter.commit("s", list(range(10, 160)))
    drafter.commit("s", [1, 2])
    assert drafter.propose([Ask("s", 1, 1)], {}) == {}


def test_begin_on_a_held_session_replaces_it(new: Callable[..., SssdDrafter]) -> None:
    drafter = new([1, 2, 1])
    drafter.begin("s", [5, 6, 5], PARAMS, 3)
    assert drafter.propose([Ask("s", 1, 1)], {})["s"].tokens.tolist() == [6]


def test_unknown_sessions_are_named_and_ending_one_does_nothing(new: Callable[..., SssdDrafter]) -> None:
    drafter = new([1, 2, 1])
    drafter.end("other")
    drafter.end("s")
    with pytest.raises(UnknownSession, match="'s'"):
        drafter.propose([Ask("s", 1, 1)], {})
    with pytest.raises(UnknownSession, match="'s'"):
        drafter.commit("s", [1])


def test_one_session_too_many_is_refused_and_an_ended_one_makes_room(new: Callable[..., SssdDrafter]) -> None:
    drafter = new([1])
    drafter.begin("t", [1], PARAMS, 1)
    with pytest.raises(Overloaded):
        drafter.begin("u", [1], PARAMS, 1)
    drafter.end("t")
    drafter.begin("u", [1], PARAMS, 1)


def test_live_sessions_leave_their_output_to_later_ones_but_not_their_prompts() -> None:
    live = LiveStores(100, min_new=1)
    drafter = SssdDrafter(SssdOptions(), live=live)
    drafter.begin("s", [40, 41, 42, 43, 1, 2], PARAMS, 6, "me")
    drafter.commit("s", [3, 4, 5])
    drafter.end("s")
    live.wait()
    drafter.begin("t", [9, 3, 4], PARAMS, 3, "me")
    assert drafter.propose([Ask("t", 1, 1)], {})["t"].tokens.tolist() == [5]
    store = live.of("me")
    assert store is not None
    assert store.text.tolist() == [43, 1, 2, 3, 4, 5, 100]


@pytest.mark.parametrize("writer", ["me", ""])
@pytest.mark.parametrize("max_tokens", [64, 32_768])
def test_what_one_owner_wrote_drafts_for_nobody_else_and_what_nobody_wrote_for_nobody(
    writer: str, max_tokens: int
) -> None:
    live = LiveStores(1000, min_new=1)
    drafter = SssdDrafter(SssdOptions(max_tokens=max_tokens), live=live)
    drafter.begin("s", [1, 2], PARAMS, 2, writer)
    drafter.commit("s", list(range(3, 203)))
    drafter.end("s")
    live.wait()
    readers = ["me", "you", ""]
    for reader in readers:
        drafter.begin(reader, [999, 150, 151], PARAMS, 3, reader)
    trees = drafter.propose([Ask(reader, 1, 1) for reader in readers], {})
    assert {reader: tree.tokens.tolist() for reader, tree in trees.items()} == ({"me": [152]} if writer else {})


def test_without_a_compiler_the_drafter_looks_up_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> None:
        raise NativeUnavailable("no g++ was found")

    monkeypatch.setattr(sssd, "library", unavailable)
    drafter = SssdDrafter(SssdOptions())
    drafter.begin("s", [1, 2, 1], PARAMS, 3)
    assert drafter.propose([Ask("s", 1, 1)], {})["s"].tokens.tolist() == [2]


def test_a_worker_that_runs_sssd_alone_never_loads_torch() -> None:
    program = (
        "import sys; from pathlib import Path; from cluster.core.config import StageConfig;"
        "from drafters import TargetFacts, create;"
        "create(StageConfig(name='small', drafter='sssd'), target=TargetFacts(10, 100, Path('none')));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})

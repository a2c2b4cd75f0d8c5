"""``TokenTree`` by hand. The tree used throughout, also in the module's docstrings::

      root
     /    \\
    0      1          tokens  = [5, 7, 6, 8, 9]
   / \\      \\         parents = [-1, -1, 0, 0, 1]
  2   3      4
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cluster.core.errors import InvalidTree
from cluster.core.token_tree import TokenTree
from cluster.core.types import TreeKey

T, F = True, False
KEY = TreeKey("s", 0, 10, 123)
EXAMPLE = TokenTree.build([5, 7, 6, 8, 9], [-1, -1, 0, 0, 1], [0.6, 0.3, 0.5, 0.1, 0.2], [1, 1, 2, 1, 2], KEY)


def parts(tree: TokenTree) -> tuple[list[int], list[int]]:
    return tree.tokens.tolist(), tree.parents.tolist()


def random_tree(n: int, seed: int) -> TokenTree:
    rng = np.random.default_rng(seed)
    parents = [int(rng.integers(-1, node)) for node in range(n)]
    return TokenTree.build(rng.integers(0, 4, n), parents, rng.random(n), rng.integers(0, 3, n))


def closed_paths(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(int(tree.tokens[i]) for i in tree.path(node)) for node in range(len(tree))}


def test_depths_and_ancestor_mask_of_the_example() -> None:
    assert EXAMPLE.depths().tolist() == [1, 1, 2, 2, 2]
    assert EXAMPLE.ancestor_mask().tolist() == [
        [T, F, F, F, F],
        [F, T, F, F, F],
        [T, F, T, F, F],
        [T, F, F, T, F],
        [F, T, F, F, T],
    ]


def test_paths_and_children_of_the_example() -> None:
    assert [EXAMPLE.path(node) for node in range(-1, 5)] == [[], [0], [1], [0, 2], [0, 3], [1, 4]]
    assert EXAMPLE.child(-1, 7) == 1
    assert EXAMPLE.child(0, 8) == 3
    assert EXAMPLE.child(0, 9) is None
    assert EXAMPLE.child(4, 5) is None


def test_what_hangs_below_a_path_becomes_a_tree_of_its_own() -> None:
    below = EXAMPLE.after([5])
    assert parts(below) == ([6, 8], [-1, -1])
    assert below.scores.tolist() == pytest.approx([0.5 / 0.6, 0.1 / 0.6])
    assert below.stages.tolist() == [2, 1]
    assert below.key is None
    assert parts(EXAMPLE.after([7])) == ([9], [-1])
    assert parts(EXAMPLE.after([])) == parts(EXAMPLE)
    for elsewhere in ([5, 6], [9], [5, 9], [7, 9, 1]):
        assert len(EXAMPLE.after(elsewhere)) == 0


def test_below_a_path_stand_exactly_the_paths_that_continue_it() -> None:
    for seed in range(50):
        tree = random_tree(24, seed)
        paths = closed_paths(tree)
        for prefix in sorted(paths):
            node = -1
            for token in prefix:  # of duplicate siblings the first is walked
                child = tree.child(node, token)
                assert child is not None or len(tree.after(prefix)) == 0
                node = -1 if child is None else child
            below = tree.after(prefix)
            assert {prefix + path for path in closed_paths(below)} <= paths
            assert bool((below.parents < np.arange(len(below))).all())
            assert bool((below.scores <= 1.0).all())


def test_of_duplicate_children_the_first_is_found() -> None:
    assert TokenTree.build([4, 4, 4], [-1, -1, 0]).child(-1, 4) == 0


@pytest.mark.parametrize("n", [1, 4, 13])
def test_mask_depths_and_paths_agree_at_any_size(n: int) -> None:
    tree = random_tree(n, seed=n)
    mask = tree.ancestor_mask()
    assert mask.shape == (n, n)
    assert (mask.sum(axis=1) == tree.depths()).all()
    for node in range(n):
        assert np.flatnonzero(mask[node]).tolist() == tree.path(node)
        assert all(tree.parents[child] == parent for parent, child in zip([-1, *tree.path(node)], tree.path(node)))


def test_an_empty_tree_has_empty_everything() -> None:
    tree = TokenTree.empty(KEY)
    tree.check(10)
    assert (len(tree), tree.key) == (0, KEY)
    assert tree.depths().shape == (0,)
    assert tree.ancestor_mask().shape == (0, 0)
    assert tree.child(-1, 0) is None
    assert len(tree.prune(3, max_depth=1)) == 0


def test_a_chain_is_a_path() -> None:
    tree = TokenTree.chain([3, 1, 2], stage=2, key=KEY)
    assert parts(tree) == ([3, 1, 2], [-1, 0, 1])
    assert tree.stages.tolist() == [2, 2, 2]
    assert tree.scores.tolist() == [1, 1, 1]
    assert len(TokenTree.chain([])) == 0


def test_stamping_a_key_changes_nothing_else() -> None:
    other = dataclasses.replace(KEY, base=11)
    stamped = EXAMPLE.with_key(other)
    assert stamped.key == other
    assert EXAMPLE.key == KEY
    assert parts(stamped) == parts(EXAMPLE)


@pytest.mark.parametrize("n", [0, 1, 4, 13])
def test_sound_trees_pass_the_check(n: int) -> None:
    random_tree(n, seed=n).check(4, max_nodes=13, max_depth=13)


@pytest.mark.parametrize(
    ("change", "limits", "message"),
    [
        pytest.param({}, {"max_nodes": 4}, "5 nodes, at most 4", id="too many nodes"),
        pytest.param({}, {"vocab_size": 9}, r"a token id is outside \[0, 9\)", id="token past the vocabulary"),
        pytest.param({"tokens": [5, -1, 6, 8, 9]}, {}, "a token id is outside", id="negative token"),
        pytest.param({"parents": [-1, -1, 0, 3, 1]}, {}, "does not stand before", id="its own parent"),
        pytest.param({"parents": [-1, 4, 0, 0, 1]}, {}, "does not stand before", id="parent behind child"),
        pytest.param({"parents": [-2, -1, 0, 0, 1]}, {}, "does not stand before", id="parent below the root"),
        pytest.param({"parents": [0, -1, 0, 0, 1]}, {}, "does not stand before", id="first node with a parent"),
        pytest.param({"scores": [1, 1, np.nan, 1, 1]}, {}, "a score is not finite", id="nan score"),
        pytest.param({"scores": [1, 1, np.inf, 1, 1]}, {}, "a score is not finite", id="infinite score"),
        pytest.param({"stages": [0, 1, 2, 3, 0]}, {}, "a stage is not one of", id="unknown stage"),
        pytest.param({}, {"max_depth": 1}, "deeper than 1", id="too deep"),
        pytest.param({"parents": [-1, -1, 0, 0]}, {}, "parents is not a", id="short parents"),
        pytest.param({"scores": [1, 1, 1, 1, 1, 1]}, {}, "scores is not a", id="long scores"),
        pytest.param({"stages": [[0, 0, 0, 0, 0]]}, {}, "stages is not a", id="two-dimensional stages"),
    ],
)
def test_each_breach_is_refused_by_name(change: dict[str, list[float]], limits: dict[str, int], message: str) -> None:
    arrays = {name: np.array(values, getattr(EXAMPLE, name).dtype) for name, values in change.items()}
    tree = dataclasses.replace(EXAMPLE, **arrays)  # type: ignore[arg-type]
    with pytest.raises(InvalidTree, match=message):
        tree.check(**{"vocab_size": 10, **limits})


@pytest.mark.parametrize("name", ["tokens", "parents", "scores", "stages"])
def test_arrays_of_another_type_are_refused(name: str) -> None:
    wide = dataclasses.replace(EXAMPLE, **{name: getattr(EXAMPLE, name).astype(np.int64)})
    with pytest.raises(InvalidTree, match=f"{name} is not a"):
        wide.check(10)
    listed = dataclasses.replace(EXAMPLE, **{name: getattr(EXAMPLE, name).tolist()})
    with pytest.raises(InvalidTree, match=f"{name} is not a"):
        listed.check(10)


def test_duplicate_siblings_and_the_highest_ids_are_sound() -> None:
    TokenTree.build([9, 9, 0], [-1, -1, 1], stages=2).check(10, max_nodes=3, max_depth=2)


def test_take_renumbers_a_sub_tree() -> None:
    tree = EXAMPLE.take(np.array([1, 4]))
    assert parts(tree) == ([7, 9], [-1, 0])
    assert tree.scores.tolist() == EXAMPLE.scores[[1, 4]].tolist()
    assert tree.stages.tolist() == [1, 2]
    assert tree.key == KEY


def test_pruning_keeps_the_best_scored_nodes() -> None:
    assert parts(EXAMPLE.prune(3)) == ([5, 7, 6], [-1, -1, 0])
    assert parts(EXAMPLE.prune(2)) == ([5, 6], [-1, 0])
    assert parts(EXAMPLE.prune(4)) == ([5, 7, 6, 9], [-1, -1, 0, 1])
    assert len(EXAMPLE.prune(0)) == 0
    assert EXAMPLE.prune(5) is EXAMPLE


def test_pruning_to_a_depth_drops_what_is_deeper() -> None:
    assert parts(EXAMPLE.prune(5, max_depth=1)) == ([5, 7], [-1, -1])
    assert parts(EXAMPLE.prune(1, max_depth=1)) == ([5], [-1])
    assert EXAMPLE.prune(5, max_depth=2) is EXAMPLE
    assert len(EXAMPLE.prune(5, max_depth=0)) == 0


def test_pruning_ties_keeps_the_earlier_nodes() -> None:
    assert parts(TokenTree.build([1, 2, 3], [-1, -1, 0]).prune(2)) == ([1, 2], [-1, -1])


def test_scores_that_lie_cannot_tear_a_child_from_its_parent() -> None:
    """Node 2 claims more than its parent 0: it counts with its parent's score and comes after node 1."""
    tree = TokenTree.build([1, 2, 3], [-1, -1, 0], [0.1, 0.5, 0.99])
    assert parts(tree.prune(1)) == ([2], [-1])
    assert parts(tree.prune(2)) == ([1, 2], [-1, -1])


@pytest.mark.parametrize("n", [1, 4, 13])
@pytest.mark.parametrize("budget", [1, 3, 12])
def test_pruned_trees_with_random_scores_stay_sound(n: int, budget: int) -> None:
    for seed in range(20):
        tree = random_tree(n, seed)
        pruned = tree.prune(budget)
        pruned.check(4, max_nodes=budget)
        assert len(pruned) == min(n, budget)
        assert closed_paths(pruned) <= closed_paths(tree)

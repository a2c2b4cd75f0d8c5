"""The engine's own counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cluster.core.stats import Histogram
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin
from cluster.rounds.buckets import Buckets
from cluster.rounds.meter import Meter

#       root
#      0    1
#     2 3    4      nodes 0 and 2 are the medium stage's
TREE = TokenTree.build([5, 7, 6, 8, 9], [-1, -1, 0, 0, 1], stages=[2, 1, 2, 1, 1])


def test_accepted_nodes_are_counted_by_stage_and_trees_by_how_deep_they_were_right() -> None:
    meter = Meter()
    for nodes in ((), (0,), (0, 2), (1, 4), (0, 3)):
        meter.verified(TREE, nodes)
    meter.verified(TokenTree.empty(), ())  # a round without a guess is no draft
    stats = meter.snapshot()
    assert stats.drafts == 5
    assert stats.drafted == {"small": 15, "medium": 10}
    assert stats.accepted == {"small": 3, "medium": 4}
    assert stats.accepted_per_pos == (4, 3)


@pytest.mark.parametrize("seed", range(5))
def test_counts_by_position_are_vllms(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 6, 30).tolist()
    meter = Meter()
    for length in lengths:
        meter.verified(TokenTree.chain([1] * 6, Origin.SMALL), range(length))
    vllms = [0] * 6  # vLLM adds one at every position below the number of accepted tokens
    for length in lengths:
        for position in range(length):
            vllms[position] += 1
    assert meter.snapshot().accepted_per_pos == tuple(itertools.takewhile(bool, vllms))
    assert sum(meter.snapshot().accepted_per_pos) == sum(meter.snapshot().accepted.values())


def test_before_the_first_tree_no_position_is_named() -> None:
    assert Meter().snapshot().accepted_per_pos == ()


def test_a_bound_belongs_to_its_own_bucket() -> None:
    buckets = Buckets((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        buckets.observe(value)
    assert buckets.snapshot() == Histogram((1.0, 2.0), (2, 2, 1), 14.0)

"""``decide`` against the plain rule, margins, and the walk by hand-written cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from plain import plain_token

from cluster.core.accept import Decision, accept, decide
from cluster.core.errors import EngineFailed
from cluster.core.noise import gumbel, keyed_noise, noise_bits
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from cluster.core.warp import History

GREEDY = SamplingParams(temperature=0.0)
NO_STOPS: frozenset[int] = frozenset()

CUTS = [
    {},
    {"min_p": 0.05},
    {"min_p": 1e-7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 700},
    {"top_p": 0.95},
    {"top_p": 0.3},
    {"top_p": 0.99999},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
]


def one_hot_rows(*tokens: int, vocab_size: int = 8) -> np.ndarray:
    """Rows whose greedy tokens are ``tokens``: the root's first, then one per node."""
    rows = np.zeros((len(tokens), vocab_size), np.float32)
    rows[np.arange(len(tokens)), tokens] = 1.0
    return rows


def fresh(params: SamplingParams) -> History:
    return History([], [], params)


def language_like_row(rng: np.random.Generator, vocab_size: int) -> np.ndarray:
    """Few likely tokens and a long tail, in random order of ids."""
    row = 12.0 - rng.uniform(1.0, 3.0) * np.log(np.arange(1, vocab_size + 1)) + rng.normal(0, 0.5, vocab_size)
    return np.asarray(rng.permutation(row), np.float32)


# decide: the straightforward computation is the yardstick, to the last bit


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 64, 65, 1000, 20_000])
def test_a_decision_equals_the_plain_rule(cut: dict[str, float], vocab_size: int) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        for row in (language_like_row(rng, vocab_size), rng.normal(size=vocab_size).astype(np.float32)):
            params = SamplingParams(temperature=[0.3, 0.8, 1.0, 1.5][seed % 4], seed=seed + 2**35, **cut)  # type: ignore[arg-type]
            decision = decide(row, params, fresh(params), seed * 1000, NO_STOPS)
            token, gap = plain_token(row, params, [], [], seed * 1000)
            assert decision.token == token
            assert decision.margin <= gap


@pytest.mark.parametrize("vocab_size", [65, 200, 5000, 49_152])
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-3])
@pytest.mark.parametrize("lowest", [-1.0, -8.0, -30.0])
def test_near_ties_over_the_whole_row_are_decided_as_by_the_plain_rule(
    vocab_size: int, spread: float, lowest: float
) -> None:
    """Rows built against the noise: logit = -G, so that every token's sum is the same up to rounding and ``spread``.

    The unlikeliest tokens come as close to winning as the likeliest: none may be missed by the bound on bits.
    """
    for seed in range(4):
        params = SamplingParams(seed=seed)
        rng = np.random.default_rng(seed)
        row = -keyed_noise(seed, 3, vocab_size) + rng.uniform(0, spread, vocab_size)
        row = np.maximum(row, lowest).astype(np.float32)
        decision = decide(row, params, fresh(params), 3, NO_STOPS)
        assert (decision.token, decision.margin) == plain_token(row, params, [], [], 3)


@pytest.mark.parametrize("kind", ["flat", "two levels", "one alone", "all but 64 masked", "all but 63 masked"])
def test_degenerate_rows_are_decided_as_by_the_plain_rule(kind: str) -> None:
    rng = np.random.default_rng(0)
    row = np.zeros(3000, np.float32)
    if kind == "two levels":
        row[rng.random(3000) < 0.5] = 2.0
    elif kind == "one alone":
        row[1:] = -np.inf
    elif kind.startswith("all but"):
        row[rng.choice(3000, 3000 - int(kind.split()[2]), replace=False)] = -np.inf
    for cut in CUTS:
        for seed in range(3):
            params = SamplingParams(seed=seed, **cut)  # type: ignore[arg-type]
            token, gap = plain_token(row, params, [], [], 0)
            decision = decide(row, params, fresh(params), 0, NO_STOPS)
            assert decision.token == token
            assert decision.margin <= gap


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.95}, {"top_k": 2}], ids=str)
def test_equal_sums_go_to_the_lower_id(cut: dict[str, float]) -> None:
    """A float64 row can tie two sums exactly: one logit is the other's plus the difference of their noise.

    Pairs whose tie is spoilt by rounding, or by a cut (more than 2 apart), are passed over.
    """
    low, high, ties_by_leader = 40, 60, {40: 0, 60: 0}
    params = SamplingParams(seed=1, **cut)  # type: ignore[arg-type]
    for position in range(300):
        noise = keyed_noise(1, position, 100)
        row = np.full(100, -60.0)
        row[low], row[high] = min(0.0, noise[high] - noise[low]), min(0.0, noise[low] - noise[high])
        if row[low] + noise[low] == row[high] + noise[high] and abs(row[low] - row[high]) < 2.0:
            ties_by_leader[int(row.argmax())] += 1
            assert decide(row, params, fresh(params), position, NO_STOPS) == Decision(low, 0.0)
    assert min(ties_by_leader.values()) > 20


def test_greedy_ties_go_to_the_lower_id_with_no_margin() -> None:
    decision = decide(np.array([1, 7, 3, 7], np.float32), GREEDY, fresh(GREEDY), 0, NO_STOPS)
    assert (decision.token, decision.margin) == (1, 0.0)


def test_the_greedy_margin_is_the_gap_of_the_two_best_logits() -> None:
    assert decide(np.array([1, 7, 3, 4.5], np.float32), GREEDY, fresh(GREEDY), 0, NO_STOPS).margin == 2.5
    assert decide(np.array([3], np.float32), GREEDY, fresh(GREEDY), 0, NO_STOPS).margin == math.inf


def test_greedy_ignores_the_cuts_and_the_seed() -> None:
    row = np.random.default_rng(0).normal(size=500).astype(np.float32)
    plain = decide(row, GREEDY, fresh(GREEDY), 0, NO_STOPS)
    params = SamplingParams(temperature=0.0, top_k=1, top_p=0.1, min_p=0.9, seed=77)
    assert decide(row, params, fresh(params), 9, NO_STOPS) == plain


@pytest.mark.parametrize("seed", range(150))
def test_moving_the_logits_by_less_than_half_the_margin_changes_no_token(seed: int) -> None:
    """The promise of ``margin``, tried with the worst move (the winner down, all others up) and with random ones."""
    rng = np.random.default_rng(seed)
    cut = [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_p": 0.95}, {"min_p": 0.2}, {"top_k": 12, "top_p": 0.8}][seed % 6]
    params = SamplingParams(temperature=[0.5, 1.0][seed % 2], seed=seed, **cut)  # type: ignore[arg-type]
    row = rng.normal(0, 1.5, 30)
    if seed % 3 == 0:
        row = np.round(row * 4) / 4 + rng.normal(0, 0.02, 30)
    decision = decide(row, params, fresh(params), 5, NO_STOPS)
    reach = min(decision.margin, 5.0) * 0.499 * params.temperature
    moves = [np.where(np.arange(30) == decision.token, -1.0, 1.0)]
    moves += [rng.choice([-1.0, 1.0], 30) for _ in range(60)]
    for move in moves:
        assert decide(row + reach * move, params, fresh(params), 5, NO_STOPS).token == decision.token


def test_the_margin_sees_a_token_that_only_the_cut_keeps_from_winning() -> None:
    noise = keyed_noise(8, 0, 3)
    loud = int(noise.argmax())
    row = np.full(3, 0.0)
    row[loud] = -0.001
    params = SamplingParams(seed=8, top_k=2)
    decision = decide(row, params, fresh(params), 0, NO_STOPS)
    assert decision.token != loud
    assert decision.margin == pytest.approx(0.001)


def test_the_margin_sees_how_close_the_token_is_to_top_ps_edge() -> None:
    params = SamplingParams(seed=0, top_p=0.701)
    row = np.log(np.array([0.7, 0.2, 0.1]))
    position = next(t for t in range(1000) if keyed_noise(0, t, 3)[1] > keyed_noise(0, t, 3)[0] + 3)
    decision = decide(row, params, fresh(params), position, NO_STOPS)
    assert decision.token == 1
    assert decision.margin == pytest.approx(0.001)


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=5)], ids=str
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 31, 199])
def test_a_row_that_is_not_a_law_is_refused(params: SamplingParams, value: float, place: int) -> None:
    row = np.random.default_rng(0).normal(size=200).astype(np.float32)
    row[place] = value
    with pytest.raises(EngineFailed, match=f"position 17 holds {value}"):
        decide(row, params, fresh(params), 17, NO_STOPS)


def test_a_row_that_allows_nothing_is_refused() -> None:
    params = SamplingParams(min_tokens=1)
    with pytest.raises(EngineFailed, match="allows no token"):
        decide(np.zeros(2, np.float32), params, fresh(params), 0, frozenset({0, 1}))


# accept: the walk


def walk(rows: np.ndarray, tree: TokenTree, params: SamplingParams = GREEDY) -> tuple[list[int], list[int]]:
    accepted = accept(rows, tree, params, fresh(params), 0, NO_STOPS)
    assert len(accepted.margins) == len(accepted.tokens) == len(accepted.nodes) + 1
    return list(accepted.nodes), list(accepted.tokens)


EXAMPLE = TokenTree.build([5, 7, 6, 0, 1], [-1, -1, 0, 0, 1])  # token_tree's example, with ids below 8


@pytest.mark.parametrize(
    ("tokens", "nodes", "emitted"),
    [
        pytest.param([5, 6, 0, 4, 0, 0], [0, 2], [5, 6, 4], id="full path"),
        pytest.param([5, 0, 0, 0, 2, 0], [0, 3], [5, 0, 2], id="second sibling"),
        pytest.param([7, 0, 1, 0, 0, 3], [1, 4], [7, 1, 3], id="second branch"),
        pytest.param([5, 3, 0, 0, 0, 0], [0], [5, 3], id="mismatch below depth 1"),
        pytest.param([6, 0, 0, 0, 0, 0], [], [6], id="mismatch at the root"),
        pytest.param([7, 5, 6, 0, 0, 0], [1], [7, 6], id="a child of another parent does not count"),
    ],
)
def test_the_walk_follows_the_targets_tokens(tokens: list[int], nodes: list[int], emitted: list[int]) -> None:
    assert walk(one_hot_rows(*tokens), EXAMPLE) == (nodes, emitted)


def test_an_empty_tree_yields_the_bonus_token() -> None:
    assert walk(one_hot_rows(3), TokenTree.empty()) == ([], [3])


def test_a_perfect_chain_is_accepted_whole() -> None:
    assert walk(one_hot_rows(4, 2, 2, 7), TokenTree.chain([4, 2, 2])) == ([0, 1, 2], [4, 2, 2, 7])


def test_of_duplicate_siblings_the_first_is_taken() -> None:
    """The second duplicate's child is unreachable, although its row would accept it."""
    tree = TokenTree.build([4, 4, 5, 6], [-1, -1, 1, 0])
    assert walk(one_hot_rows(4, 6, 5, 0, 1), tree) == ([0, 3], [4, 6, 1])


def test_rows_off_the_walk_are_not_read() -> None:
    rows = one_hot_rows(5, 3, 0, 0, 0, 0)
    rows[2:] = np.nan
    assert walk(rows, EXAMPLE) == ([0], [5, 3])


def test_a_bad_row_ends_the_walk_before_its_node() -> None:
    """Plain decoding emits what comes before it, and never computes it where that is a stop."""
    rows = one_hot_rows(5, 6, 0, 0, 0, 0)
    rows[3] = np.nan
    history = History([1], [2, 2], GREEDY)
    accepted = accept(rows, EXAMPLE, GREEDY, history, 10, NO_STOPS)
    assert (accepted.nodes, accepted.tokens, len(accepted.margins)) == ((0,), (5, 6), 2)
    assert history.output_len == 2


def test_a_bad_first_row_fails_and_leaves_the_history_as_it_was() -> None:
    rows = one_hot_rows(5, 6, 0, 0, 0, 0)
    rows[0] = np.nan
    history = History([1], [2, 2], GREEDY)
    with pytest.raises(EngineFailed, match="position 10"):
        accept(rows, EXAMPLE, GREEDY, history, 10, NO_STOPS)
    assert history.output_len == 2


def test_as_many_rows_as_nodes_and_one_are_required() -> None:
    for count in (5, 7):
        with pytest.raises(ValueError, match=f"{count} rows for a tree of 5 nodes"):
            accept(np.zeros((count, 8), np.float32), EXAMPLE, GREEDY, fresh(GREEDY), 0, NO_STOPS)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, repetition_penalty=1.7, frequency_penalty=0.4, presence_penalty=0.6),
        SamplingParams(seed=4, repetition_penalty=1.3, frequency_penalty=-0.2, top_p=0.9),
        SamplingParams(seed=5, min_tokens=3, max_tokens=9, temperature=0.8),
        SamplingParams(seed=6, presence_penalty=2.0, top_k=4, logit_bias=((3, 2.0), (1, -100.0))),
    ],
    ids=str,
)
def test_a_path_is_decided_as_by_sequential_decoding(params: SamplingParams) -> None:
    """A context-free target, so that only history, stops and noise tell positions apart: one walk, or one by one."""
    row = np.array([2.0, 1.5, 1.8, 1.0, 0.5, 1.7], np.float32)
    prompt, output, stops = [0, 3, 3], [2], frozenset({0})
    expected: list[int] = []
    for _ in range(6):
        position = len(prompt) + len(output) + len(expected)
        expected.append(plain_token(row, params, prompt, output + expected, position, set(stops))[0])
    history = History(prompt, output, params)
    for depth in range(6):
        tree = TokenTree.chain(expected[:depth])
        accepted = accept(np.tile(row, (depth + 1, 1)), tree, params, history, 4, stops)
        assert list(accepted.tokens) == expected[: depth + 1]
        assert history.output_len == 1
    assert len(set(expected)) > 1


def test_a_stop_token_is_masked_along_the_path_until_min_tokens() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=2)
    rows = np.tile(np.array([3.0, 1.0, 2.0], np.float32), (3, 1))
    accepted = accept(rows, TokenTree.chain([2, 2]), params, fresh(params), 0, frozenset({0}))
    assert accepted.tokens == (2, 2, 0)


def test_a_sampled_walk_draws_each_depth_at_its_own_position() -> None:
    params = SamplingParams(seed=3)
    rows = np.zeros((4, 8), np.float32)
    tokens = [int(gumbel(noise_bits(3, 20 + depth, np.arange(8))).argmax()) for depth in range(4)]
    accepted = accept(rows, TokenTree.chain(tokens[:3]), params, fresh(params), 20, NO_STOPS)
    assert list(accepted.tokens) == tokens

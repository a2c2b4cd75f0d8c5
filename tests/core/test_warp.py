"""Biases, masks and penalties by hand-computed values, the search for the best tokens, the cuts at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from plain import constrained, kept_tokens

from cluster.core.types import SamplingParams
from cluster.core.warp import Head, History, constrain, rank, top

NO_STOPS: frozenset[int] = frozenset()


def row_of(*logits: float) -> np.ndarray:
    return np.array(logits, np.float32)


def kept(row: np.ndarray, params: SamplingParams) -> Head:
    return rank(row, float(row.max()), params)


def test_a_row_without_constraints_is_passed_through_uncopied() -> None:
    row, params = row_of(1, 2, 3), SamplingParams()
    assert constrain(row, params, History([0], [1], params), frozenset({2})) is row


def test_constraining_leaves_the_models_row_as_it_was() -> None:
    params = SamplingParams(logit_bias=((0, 5.0),), repetition_penalty=2.0, min_tokens=1)
    row = row_of(1, 2, 3)
    constrain(row, params, History([0], [], params), frozenset({2}))
    assert row.tolist() == [1, 2, 3]


def test_logit_bias_is_added_and_foreign_ids_have_no_effect() -> None:
    params = SamplingParams(logit_bias=((1, -2.5), (3, 100.0), (-1, 7.0), (99, 7.0)))
    assert constrain(row_of(0, 1, 2, 3), params, History([], [], params), NO_STOPS).tolist() == [0, -1.5, 2, 103]


def test_stop_ids_are_masked_until_the_output_has_min_tokens() -> None:
    params = SamplingParams(min_tokens=2)
    history = History([5, 5, 5], [], params)
    for length, masked in ((0, True), (1, True), (2, False)):
        assert history.output_len == length
        row = constrain(row_of(0, 1, 2), params, history, frozenset({1, 77}))
        assert row.tolist() == ([0, -math.inf, 2] if masked else [0, 1, 2])
        history.push(0)


def test_penalties_follow_vllms_formulas() -> None:
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    history = History([0, 1, 1], [2, 2, 3], params)
    # prompt only: repetition; output: repetition, then 0.5 per occurrence, then 0.25 once; token 4: untouched
    assert constrain(row_of(4, -4, 4, -4, 4), params, history, NO_STOPS).tolist() == [2, -8, 0.75, -8.75, 4]


def test_penalties_apply_after_bias_and_mask() -> None:
    params = SamplingParams(repetition_penalty=2.0, logit_bias=((0, 3.0),), min_tokens=9)
    assert constrain(row_of(1, 1), params, History([0, 1], [], params), frozenset({1})).tolist() == [2, -math.inf]


def test_push_and_pop_restore_the_penalties() -> None:
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.3, presence_penalty=0.7)
    history = History([0], [1], params)
    row = row_of(*range(-3, 5))
    before = constrain(row, params, history, NO_STOPS)
    for token in (1, 7, 7, 0):
        history.push(token)
    assert (
        constrain(row, params, history, NO_STOPS)
        == constrain(row, params, History([0], [1, 1, 7, 7, 0], params), NO_STOPS)
    ).all()
    for _ in range(4):
        history.pop()
    assert (constrain(row, params, history, NO_STOPS) == before).all()


def test_a_history_grows_past_any_number_of_distinct_tokens() -> None:
    params = SamplingParams(presence_penalty=1.0)
    history = History(range(300), range(200, 700), params)
    row = constrain(np.zeros(1000, np.float32), params, history, NO_STOPS)
    assert (np.flatnonzero(row) == np.arange(200, 700)).all()


def test_popping_an_empty_history_is_an_error() -> None:
    with pytest.raises(IndexError):
        History([1], [], SamplingParams()).pop()


def test_a_history_built_without_penalties_refuses_to_serve_them() -> None:
    params = SamplingParams(presence_penalty=1.0)
    with pytest.raises(ValueError, match="without penalties"):
        constrain(row_of(1, 2), params, History([0], [], SamplingParams()), NO_STOPS)


@pytest.mark.parametrize("seed", range(20))
def test_constraints_equal_the_plain_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = SamplingParams(
        logit_bias=tuple((int(token), float(rng.normal())) for token in rng.choice(40, 5, replace=False)),
        repetition_penalty=float(rng.uniform(0.5, 2)),
        frequency_penalty=float(rng.uniform(-2, 2)),
        presence_penalty=float(rng.uniform(-2, 2)),
        min_tokens=int(rng.integers(0, 12)),
    )
    prompt, output = rng.integers(0, 40, 30).tolist(), rng.integers(0, 40, 8).tolist()
    row, stops = rng.normal(0, 3, 40).astype(np.float32), {3, 17}
    expected = constrained(row, params, prompt, output, stops)
    assert (constrain(row, params, History(prompt, output, params), frozenset(stops)) == expected).all()


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 700, 769, 5000])
@pytest.mark.parametrize("k", [1, 2, 64])
@pytest.mark.parametrize("kind", ["spread", "few levels", "flat", "rising", "falling", "mostly masked"])
def test_the_best_tokens_are_those_of_a_full_stable_sort(vocab_size: int, k: int, kind: str) -> None:
    rng = np.random.default_rng(vocab_size)
    row = {
        "spread": rng.normal(size=vocab_size),
        "few levels": rng.integers(0, 3, vocab_size),
        "flat": np.full(vocab_size, 2.5),
        "rising": np.arange(vocab_size),
        "falling": -np.arange(vocab_size),
        "mostly masked": np.where(rng.random(vocab_size) < 0.99, -np.inf, rng.normal(size=vocab_size)),
    }[kind].astype(np.float32)
    order = np.argsort(-row, kind="stable")[:k]
    assert top(row, min(k, vocab_size)).tolist() == order[row[order] > -np.inf].tolist()


@pytest.mark.parametrize(
    ("params", "ids"),
    [
        (SamplingParams(top_k=3), [2, 0, 3]),
        (SamplingParams(top_k=1), [2]),
        (SamplingParams(top_k=7), [2, 0, 3, 4, 1, 5]),
        (SamplingParams(top_k=-1), [2, 0, 3, 4, 1, 5]),
        (SamplingParams(min_p=1.0), [2]),
        (SamplingParams(min_p=0.49), [2, 0, 3, 4]),
        (SamplingParams(top_p=1e-9), [2]),
        (SamplingParams(top_p=0.75), [2, 0, 3, 4]),
        (SamplingParams(top_p=0.51, top_k=3), [2, 0]),
        (SamplingParams(top_p=0.5, min_p=0.49), [2, 0]),
        (SamplingParams(temperature=100.0, min_p=0.5), [2, 0, 3, 4, 1, 5]),
    ],
    ids=str,
)
def test_cuts_keep_the_expected_tokens(params: SamplingParams, ids: list[int]) -> None:
    """Masses 4, 2, 2, 2, 1, 1 of 12 for tokens 2, 0, 3, 4, 1, 5: ties are cut from the higher id on."""
    row = np.log(np.array([2, 1, 4, 2, 2, 1], np.float32))
    head = kept(row, params)
    assert head.ids[: head.kept].tolist() == ids


def test_a_token_stays_only_while_the_mass_before_it_falls_short_of_top_p() -> None:
    """Eight equal tokens: masses are exact, so top_p 0.5 keeps four and a hair more keeps five."""
    row = np.zeros(8, np.float32)
    assert kept(row, SamplingParams(top_p=0.5)).kept == 4
    assert kept(row, SamplingParams(top_p=math.nextafter(0.5, 1))).kept == 5


@pytest.mark.parametrize("seed", range(60))
def test_cuts_equal_those_of_a_full_sort(seed: int) -> None:
    """Rows from peaked to nearly flat, with ties and masks, so that prefixes of every length are needed."""
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.choice([5, 64, 65, 1000, 6000]))
    row = rng.normal(0, rng.choice([0.01, 1, 5]), vocab_size).astype(np.float32)
    if seed % 3 == 0:
        row = np.round(row)
    if seed % 4 == 0:
        row[rng.random(vocab_size) < 0.5] = -np.inf
        row[0] = 1.0
    params = SamplingParams(
        temperature=float(rng.choice([0.3, 0.8, 1.0, 2.0])),
        top_p=float(rng.choice([1.0, 0.1, 0.5, 0.95, 0.9999])),
        top_k=int(rng.choice([0, 0, 1, 7, 64, 500])),
        min_p=float(rng.choice([0.0, 0.0, 0.01, 0.6])),
    )
    head = kept(row, params)
    if head.open:
        assert params.top_k == 0
        assert params.top_p == 1.0
        assert set(head.ids.tolist()) <= kept_tokens(row, params)
    else:
        allowed = {token for token in kept_tokens(row, params) if row[token] > -np.inf}
        assert set(head.ids[: head.kept].tolist()) == allowed


def test_the_prefix_holds_the_first_token_that_is_cut() -> None:
    row = -np.arange(10_000, dtype=np.float32) / 1000
    for params in (SamplingParams(top_k=64), SamplingParams(top_p=0.0621), SamplingParams(min_p=0.97)):
        head = kept(row, params)
        assert head.kept < len(head.ids) < 10_000


def test_the_lowest_temperatures_leave_the_best_token() -> None:
    for temperature in (1e-30, 5e-324):
        head = kept(row_of(1, 3, 2, 3e38), SamplingParams(temperature=temperature, top_p=0.9))
        assert head.ids[: head.kept].tolist() == [3]

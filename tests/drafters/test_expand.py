"""Expansion: the order is the target's own (same noise, same cuts), the probabilities are what they claim to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cluster.core.noise import keyed_noise_at
from cluster.core.types import SamplingParams
from cluster.core.warp import History
from drafters.expand import Place, expand

VOCAB = 300


def rows(seed: int, count: int, scale: float = 2.0) -> npt.NDArray[np.float32]:
    return scale * np.random.default_rng(seed).standard_normal((count, VOCAB), np.float32)


def place(position: int = 7, **options: Any) -> Place:
    params = SamplingParams(**{"seed": 11, **options})
    return Place(params, position, History([], [], params))


def test_greedy_children_are_the_best_logits_with_their_softmax() -> None:
    logits = rows(0, 3)
    tokens, probs = expand(logits, [place(temperature=0.0)] * 3)
    best = np.argsort(-logits, axis=1)[:, :64]
    assert tokens.tolist() == best.tolist()
    weights = np.exp(np.take_along_axis(logits, best, axis=1).astype(np.float64))
    assert probs == pytest.approx(weights / weights.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_sampled_children_are_the_best_of_the_row_perturbed_with_the_targets_noise(temperature: float) -> None:
    logits = rows(1, 20, scale=5.0)
    places = [place(position, temperature=temperature) for position in range(20)]
    tokens, _ = expand(logits, places)
    for row in range(20):
        perturbed = logits[row].astype(np.float64) / temperature + keyed_noise_at(11, row, np.arange(VOCAB))
        assert tokens[row][:2].tolist() == np.argsort(-perturbed)[:2].tolist()


def test_a_low_temperature_goes_over_into_greedy() -> None:
    logits = rows(2, 4)
    greedy = expand(logits, [place(temperature=0.0)] * 4)
    nearly = expand(logits, [place(temperature=1e-9)] * 4)
    assert greedy[0].tolist() == nearly[0].tolist()
    assert greedy[1] == pytest.approx(nearly[1], abs=1e-6)


def test_rows_of_different_sessions_do_not_touch_each_other() -> None:
    logits = rows(3, 3)
    places = [place(temperature=0.0), place(4, seed=5, top_p=0.5), place(9, temperature=0.7, logit_bias=((8, 5.0),))]
    tokens, probs = expand(logits, places)
    for row in range(3):
        alone = expand(logits[row : row + 1], places[row : row + 1])
        assert tokens[row].tolist() == alone[0][0].tolist()
        assert probs[row].tolist() == alone[1][0].tolist()


def test_each_rows_probabilities_fall_and_sum_to_one() -> None:
    tokens, probs = expand(rows(4, 5), [place(position) for position in range(5)])
    assert tokens.shape == probs.shape == (5, 64)
    assert probs.sum(axis=1) == pytest.approx(np.ones(5))
    assert np.all(np.diff(probs, axis=1) <= 0)


def test_ties_go_to_the_lower_token_id() -> None:
    logits = np.zeros((1, 40), np.float32)
    logits[0, 30] = 1.0
    tokens, _ = expand(logits, [place(temperature=0.0)])
    assert tokens[0].tolist() == [30, *range(30), *range(31, 40)]


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"min_p": 0.45}, {0, 1}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_tokens_the_session_rules_out_have_no_chance(cut: dict[str, Any], left: set[int]) -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.2, 0.05]], np.float32))
    tokens, probs = expand(logits, [place(**cut)])
    assert {int(token) for token, prob in zip(tokens[0], probs[0]) if prob > 0} == left


def test_a_bias_lifts_a_token_that_was_below_the_top() -> None:
    logits = rows(5, 1)
    lowest = int(logits[0].argmin())
    before = logits.copy()
    tokens, _ = expand(logits, [place(temperature=0.0, logit_bias=((lowest, 100.0),))])
    assert tokens[0, 0] == lowest
    assert np.array_equal(logits, before)


@pytest.mark.parametrize(("temperature", "scale"), [(0.0, 1.0), (1.0, 1.0), (0.5, 2.0)])
def test_the_estimate_is_the_chance_of_a_target_that_differs_by_gumbel_noise(temperature: float, scale: float) -> None:
    """20,000 simulated targets per row: a deviation beyond 5 standard errors has a chance of 1e-5 over all checks."""
    logits = rows(6, 2)[:, :40]
    places = [place(position, temperature=temperature) for position in range(2)]
    tokens, probs = expand(logits, places, error_scale=scale)
    rng = np.random.default_rng(0)
    for row in range(2):
        perturbed = logits[row].astype(np.float64) + temperature * keyed_noise_at(11, row, np.arange(40))
        chosen = (perturbed + rng.gumbel(scale=scale, size=(20_000, 40))).argmax(axis=1)
        for token, prob in zip(tokens[row][:5], probs[row][:5]):
            error = np.sqrt(prob * (1 - prob) / 20_000)
            assert abs((chosen == token).mean() - prob) < 5 * error + 1e-9


def test_forbidden_logits_are_no_candidates() -> None:
    logits = np.full((2, VOCAB), -np.inf, np.float32)
    logits[:, [4, 9]] = [[1.0, 2.0], [2.0, 1.0]]
    tokens, probs = expand(logits, [place(temperature=0.0)] * 2)
    assert tokens[:, :2].tolist() == [[9, 4], [4, 9]]
    assert np.all(probs[:, :2] > 0)
    assert np.all(probs[:, 2:] == 0)

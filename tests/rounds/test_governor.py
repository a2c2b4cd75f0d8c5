"""The governor's pure choices against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cluster.core.token_tree import TokenTree
from cluster.rounds.governor import Calibration, CostCurve, ModeChooser, choose_nodes

CURVE = CostCurve((1, 4, 8, 16), (1.0, 1.1, 1.5, 3.0))


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = [np.sort(rng.random(rng.integers(0, 5)))[::-1] for _ in range(3)]
    counts = choose_nodes(scores, CURVE, max_nodes=8, base_rows=3)

    def value(choice: tuple[int, ...]) -> float:
        gain = 3 + sum(part[:count].sum() for part, count in zip(scores, choice))
        return gain / CURVE.at(3 + sum(choice))

    best = max((c for c in itertools.product(*(range(len(part) + 1) for part in scores)) if sum(c) <= 8), key=value)
    assert value(tuple(counts)) == pytest.approx(value(best))


def test_worthless_guesses_are_not_verified() -> None:
    assert choose_nodes([np.full(8, 0.01)], CURVE, 8, 1) == [0]


def test_sure_guesses_are_verified() -> None:
    assert choose_nodes([np.full(3, 0.9)], CURVE, 8, 1) == [3]


def test_no_sessions_no_nodes() -> None:
    assert choose_nodes([], CURVE, 8, 0) == []


def test_calibration_learns_that_confident_guesses_fail() -> None:
    calibration = Calibration()
    tree = TokenTree.build([1, 2], [-1, 0], [0.95, 0.9], 1)
    assert calibration.scores(tree)[0] == pytest.approx(0.95, abs=1e-3)
    for _ in range(200):
        calibration.observe(tree, [])
    low = calibration.scores(tree)
    assert low[0] < 0.1
    assert low[1] <= low[0]
    for _ in range(2000):
        calibration.observe(tree, [0, 1])
    assert calibration.scores(tree)[0] > 0.8


def test_the_faster_mode_is_used_and_the_other_looked_at_again() -> None:
    chooser = ModeChooser()
    used = []
    for _ in range(400):
        mode = chooser.choose(["local", "remote"])
        used.append(mode)
        chooser.observe(mode, 2, 0.01 if mode == "local" else 0.03)
    assert used.count("local") > 300
    assert used[200:].count("remote") >= 4

"""The governor's pure choices against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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


def test_guesses_that_stopped_paying_are_tried_again_but_rarely() -> None:
    calibration = Calibration()
    tree = TokenTree.chain([1], stage=1)
    tried: list[int] = []
    for at in range(4000):
        count = choose_nodes([calibration.scores(tree)], CURVE, 8, 1)[0]
        calibration.observe(tree.prune(count), [])
        calibration.forget()
        if count:
            tried.append(at)
    late = [at for at in tried if at >= 2000]
    assert 3 <= len(late) <= 400
    for _ in range(200):
        nodes = list(range(choose_nodes([calibration.scores(tree)], CURVE, 8, 1)[0]))
        calibration.observe(tree.prune(len(nodes)), nodes)
        calibration.forget()
    assert choose_nodes([calibration.scores(tree)], CURVE, 8, 1) == [1]


def run(
    chooser: ModeChooser, rounds: int, steps: dict[str, float], modes: Sequence[str] = ("local", "remote")
) -> list[str]:
    """The modes of so many rounds, each of which yields two tokens and takes ``steps[mode]``."""
    used = []
    for _ in range(rounds):
        used.append(chooser.choose(modes))
        chooser.observe(used[-1], 2.0, steps[used[-1]])
    return used


def test_the_faster_mode_is_used_and_the_other_looked_at_again_at_little_cost() -> None:
    chooser = ModeChooser()
    run(chooser, 1000, {"local": 1.0, "remote": 5.0})
    used = run(chooser, 5000, {"local": 1.0, "remote": 5.0})
    looks = used.count("remote")
    assert looks >= 4
    assert looks * 4.0 < 0.03 * 5000


def test_a_mode_that_became_faster_is_found() -> None:
    chooser = ModeChooser()
    run(chooser, 2000, {"local": 1.0, "remote": 3.0})
    used = run(chooser, 2000, {"local": 1.0, "remote": 0.5})
    assert used[-500:].count("remote") > 400


def test_a_mode_that_is_hardly_better_is_not_worth_a_change() -> None:
    chooser = ModeChooser()
    used = run(chooser, 500, {"local": 1.0, "remote": 0.97})
    assert used.count("local") > 300


def test_the_round_after_a_change_is_not_measured() -> None:
    chooser = ModeChooser()
    chooser.observe("local", 2.0, 1.0)
    chooser.observe("local", 2.0, 1.0)
    chooser.observe("remote", 1.0, 50.0)  # the drafters catch up
    chooser.observe("remote", 2.0, 0.5)
    assert chooser.speed("remote") == pytest.approx(4.0)

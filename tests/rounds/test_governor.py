"""The governor's pure choices against brute force."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from cluster.core.config import EngineConfig
from cluster.core.token_tree import TokenTree
from cluster.engine.step_cost import CostCurve
from cluster.rounds.calibration import Calibration, Offer, emitted_path
from cluster.rounds.cost import LiveCost
from cluster.rounds.governor import MARGIN, Governor, RoundSpent, Shape, choose_nodes
from cluster.rounds.modes import ModeChooser

CURVE = CostCurve((1, 4, 8, 16), (1.0, 1.1, 1.5, 3.0))


def observe(calibration: Calibration, tree: TokenTree, emitted: Sequence[int] | None, name: str = "s") -> None:
    calibration.observe([Offer.of(name, tree)], [emitted])


def scores(calibration: Calibration, tree: TokenTree, name: str = "s") -> list[float]:
    return calibration.scores([Offer.of(name, tree)])[0]


def span(first: int, count: int) -> list[float]:
    """Seconds of steps of ``first``, ``first + 1``, ... rows."""
    return LiveCost(CURVE).rounds(first, count)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = [np.sort(rng.random(rng.integers(0, 5)))[::-1] for _ in range(3)]
    counts = choose_nodes(scores, span(3, 9))

    def value(choice: tuple[int, ...]) -> float:
        gain = 3 + sum(part[:count].sum() for part, count in zip(scores, choice))
        return gain / CURVE.at(3 + sum(choice))

    best = max((c for c in itertools.product(*(range(len(part) + 1) for part in scores)) if sum(c) <= 8), key=value)
    assert value(tuple(counts)) == pytest.approx(value(best), rel=MARGIN - 1)


def test_worthless_guesses_are_not_verified() -> None:
    assert choose_nodes([np.full(8, 0.01)], span(1, 9)) == [0]


def test_sure_guesses_are_verified() -> None:
    assert choose_nodes([np.full(3, 0.9)], span(1, 9)) == [3]


def test_drafters_are_told_to_leave_out_what_could_not_pay() -> None:
    curve = CostCurve((1, 64), (1.0, 7.3))  # a row costs a tenth of a second
    governor = Governor(EngineConfig(), curve)
    alone, many = governor.least_score(1, 0.0), governor.least_score(10, 0.0)
    assert 0.0 < alone < 0.1  # a node pays from 0.1 on
    assert alone < many < 0.1 / (1.9 / 10)
    assert Governor(EngineConfig(governor="always"), curve).least_score(1, 0.0) == 0.0


@pytest.mark.parametrize("sessions", [1, 15, 16])
def test_a_step_without_room_asks_for_the_likeliest_at_most(sessions: int) -> None:
    governor = Governor(EngineConfig(max_rows=16, kv_slots=16), CostCurve((1, 16), (1.0, 2.5)))
    assert governor.least_score(sessions, 0.0) >= 0.4 * 0.1 * sessions / (1.0 + 0.1 * (sessions - 1))


def test_rounds_in_which_nothing_was_offered_are_no_evidence() -> None:
    class Strict(Calibration):
        def observe(self, offers: Sequence[Offer], emitted: Sequence[Sequence[int] | None]) -> None:
            assert offers
            super().observe(offers, emitted)

    governor = Governor(EngineConfig(), CURVE)
    governor.calibration = Strict()
    for trees in ([], [TokenTree.empty()], [TokenTree.build([1], [-1], [0.5], 1)]):
        governor.budget(["s"][: len(trees)], trees, 0, 0.0)
        governor.learn([[1, 2]] * len(trees))


def test_no_sessions_no_nodes() -> None:
    assert choose_nodes([], span(0, 9)) == []


def test_calibration_learns_that_confident_guesses_fail() -> None:
    calibration = Calibration()
    tree = TokenTree.build([1, 2], [-1, 0], [0.95, 0.9], 1)
    assert scores(calibration, tree, "s")[0] == pytest.approx(0.95, abs=1e-3)
    for _ in range(200):
        observe(calibration, tree, [7], "s")
    low = scores(calibration, tree, "another")
    assert low[0] < 0.1
    assert low[1] <= low[0]
    for _ in range(2000):
        observe(calibration, tree, [1, 2, 7], "s")
    assert scores(calibration, tree, "another")[0] > 0.8


def test_guesses_that_were_not_verified_are_evidence_as_well() -> None:
    calibration = Calibration()
    offered = TokenTree.build([1, 2], [-1, 0], [0.3, 0.24], 1)
    before = scores(calibration, offered, "s")
    for _ in range(100):
        observe(calibration, offered, [1], "s")  # plain decoding emitted what the tree's first node had guessed
    after = scores(calibration, offered, "another")
    assert after[0] > 0.9 > before[0]
    assert after[1] / after[0] == pytest.approx(before[1] / before[0], rel=0.1)  # nothing was learnt of the second


def test_a_session_whose_guesses_fail_is_told_from_one_whose_hold() -> None:
    calibration = Calibration()
    tree = TokenTree.build([1], [-1], [0.5], 1)
    for _ in range(100):
        observe(calibration, tree, [1, 7], "holds")
        observe(calibration, tree, [7], "fails")
    assert scores(calibration, tree, "holds")[0] > 0.8
    assert scores(calibration, tree, "fails")[0] < 0.2
    assert scores(calibration, tree, "new")[0] == pytest.approx(0.5, abs=0.1)
    calibration.forget("fails")
    assert scores(calibration, tree, "fails")[0] == pytest.approx(0.5, abs=0.1)


def test_sessions_laid_out_together_count_as_they_would_alone() -> None:
    rng = np.random.default_rng(3)
    together, alone = Calibration(), Calibration()
    for _ in range(30):
        trees = [random_tree(rng) for _ in range(4)]
        emitted = [rng.integers(0, 4, 3).tolist() if at != 2 else None for at in range(4)]
        names = ["a", "b", "c", "d"]
        together.observe(list(map(Offer.of, names, trees)), emitted)
        for name, tree, tokens in zip(names, trees, emitted):
            observe(alone, tree, tokens, name)
        for name, tree, path in zip(names, trees, together.scores(list(map(Offer.of, names, trees)))):
            assert len(path) == len(tree)
            above = [*path, 1.0]
            assert all(score <= above[parent] for score, parent in zip(path, tree.parents.tolist()))
            assert path == pytest.approx(scores(alone, tree, name), rel=0.15)


def random_tree(rng: np.random.Generator) -> TokenTree:
    size = int(rng.integers(0, 6))
    parents = [int(rng.integers(-1, node)) if node else -1 for node in range(size)]
    chances: list[float] = []
    for parent in parents:
        chances.append(float(rng.uniform(0.1, 1.0)) * (chances[parent] if parent >= 0 else 1.0))
    return TokenTree.build(rng.integers(0, 4, size), parents, chances, 1)


def test_the_first_of_equal_siblings_is_the_one_that_was_right() -> None:
    tree = TokenTree.build([5, 5, 6, 6], [-1, -1, 0, 1], [0.5, 0.5, 0.2, 0.2], 1)
    assert emitted_path(tree, [5, 6, 9]) == [0, 2]
    assert emitted_path(tree, [9]) == emitted_path(TokenTree.empty(), [9]) == []


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


def test_a_mode_that_is_no_way_any_more_keeps_nobody_from_looking_at_the_others() -> None:
    chooser = ModeChooser()
    steps = {"local": 1.0, "remote": 3.0, "alternating": 0.5}
    run(chooser, 2000, steps, ("local", "remote", "alternating"))
    assert chooser.in_use == "alternating"
    used = run(chooser, 3000, steps | {"remote": 0.7})
    assert used[-500:].count("remote") > 400


def test_where_rounds_cannot_be_measured_no_unknown_mode_is_tried() -> None:
    chooser = ModeChooser()
    assert chooser.choose(["local", "plain", "remote"], measurable=False) == "local"
    for _ in range(10):
        chooser.observe("local", 1.0, 1.0)
    for _ in range(10):
        chooser.observe("plain", 1.0, 0.8)
    assert {chooser.choose(["local", "plain", "remote"], measurable=False) for _ in range(200)} == {"plain"}


def test_a_mode_that_is_hardly_better_is_not_worth_a_change() -> None:
    chooser = ModeChooser()
    used = run(chooser, 500, {"local": 1.0, "remote": 0.97})
    assert used.count("local") > 300


@pytest.mark.parametrize(("modes", "kept"), [(("local", "plain"), "local"), (("plain", "remote"), "plain")])
def test_a_trial_of_what_can_hardly_be_measured_ends_all_the_same(modes: Sequence[str], kept: str) -> None:
    chooser = ModeChooser()
    used = [chooser.choose(modes) for _ in range(2000)]
    assert used[-1000:].count(kept) > 900


@pytest.mark.parametrize("interrupted", [0, 10, 500])
def test_one_interrupted_round_changes_no_mode(interrupted: int) -> None:
    chooser, used = ModeChooser(), []
    for at in range(1000):
        used.append(chooser.choose(("local", "plain")))
        steps = 1000.0 if at == interrupted else 1.2
        chooser.observe(used[-1], 2.0 if used[-1] == "local" else 1.0, steps if used[-1] == "local" else 1.0)
    assert used.count("local") > 900


def test_the_round_after_a_change_is_not_measured() -> None:
    chooser = ModeChooser()
    chooser.observe("local", 2.0, 1.0)
    chooser.observe("local", 2.0, 1.0)
    chooser.observe("remote", 1.0, 50.0)  # the drafters catch up
    chooser.observe("remote", 2.0, 0.5)
    assert chooser.speed("remote") == pytest.approx(4.0)


SURE = TokenTree.build([5, 6, 7], [-1, 0, 1], [1.0, 1.0, 1.0], stages=1)
UNSURE = TokenTree.build([5, 6, 7], [-1, -1, -1], [0.01, 0.01, 0.01], stages=1)
HALF = TokenTree.build([5, 6, 7], [-1, -1, -1], [0.98, 0.01, 0.01], stages=1)


@pytest.mark.parametrize(
    ("trees", "prompt_rows", "changes", "reason", "nodes"),
    [
        ([TokenTree.empty()], 0, {}, "nothing_offered", 0),
        ([UNSURE], 0, {}, "nothing_pays", 0),
        ([HALF], 0, {}, "best_pay", 1),
        ([SURE], 0, {}, "all_pay", 3),
        ([SURE], 5, {}, "no_room", 2),
        ([SURE], 7, {}, "no_room", 0),
        ([UNSURE], 0, {"governor": "always"}, "always", 3),
    ],
)
def test_why_a_step_has_so_many_nodes_is_counted(
    trees: list[TokenTree], prompt_rows: int, changes: dict[str, object], reason: str, nodes: int
) -> None:
    config = EngineConfig.model_validate({"max_rows": 8, "kv_slots": 2} | changes)
    governor = Governor(config, CostCurve((1, 8), (1.0, 2.0)))
    chosen = governor.budget(["s"], trees, prompt_rows, 0.0)
    count = sum(map(len, chosen))
    governor.observe("local", Shape(1, count, prompt_rows, 0.0), 1, RoundSpent(0.0, 1.0, 0.0, 1.0))
    report = governor.report("local")
    assert count == nodes
    assert report.choices == {reason: 1}
    assert (sum(report.nodes.counts), report.nodes.total) == (1, nodes)


def test_a_step_without_decoding_sessions_is_no_choice() -> None:
    governor = Governor(EngineConfig(), CURVE)
    governor.budget([], [], 16, 0.0)
    governor.observe("local", Shape(0, 0, 16, 0.0), 0, RoundSpent(0.0, 1.0, 0.0, 1.0))
    report = governor.report("local")
    assert report.choices == {}
    assert sum(report.nodes.counts) == 0


def test_drift_is_reported_once_even_where_the_report_fails() -> None:
    governor, calls = Governor(EngineConfig(), CURVE), list[int]()

    def on_drift() -> None:
        calls.append(1)
        raise RuntimeError("nobody listens")

    governor.on_drift = on_drift
    for at in range(1000):
        shape = Shape(1, (0, 7)[at % 2], 0, 0.0)
        seconds = CURVE.at(shape.rows) * (2.5 if shape.nodes else 1.0)
        with contextlib.suppress(RuntimeError):
            governor.observe("local", shape, 1, RoundSpent(0.0, seconds, 0.0, seconds))
    assert calls == [1]

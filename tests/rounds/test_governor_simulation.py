"""The governor in a simulated engine: near the best fixed width where guesses hold, near plain decoding where not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from simulation import CPU, GPU, Machine, Text, fixed, governed

from cluster.core.config import EngineConfig
from cluster.engine.step_cost import CostCurve
from cluster.rounds.cost import LiveCost
from cluster.rounds.forecast import flat_curve, forecast
from cluster.rounds.gate import AskGate
from cluster.rounds.governor import Governor, RoundSpent, Shape

ROUNDS = 1500
TEXTS: dict[str, Callable[[int], list[Text]]] = {
    "good": lambda n: [Text([0.8] * 8, [0.75] * 8) for _ in range(n)],
    "overconfident": lambda n: [Text([0.9] * 8, [0.25] * 8) for _ in range(n)],
    "wrong": lambda n: [Text([1.0] * 8, [0.0] * 8, width=3) for _ in range(n)],
    "bursts": lambda n: [Text([0.7] * 8, [0.7] * 8, quiet=40) for _ in range(n)],
    "mixed": lambda n: [Text([0.7] * 8, [0.8 if at % 2 else 0.0] * 8) for at in range(n)],
}


@pytest.mark.parametrize("sessions", [1, 4, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", TEXTS)
def test_no_fixed_width_is_clearly_better_and_plain_decoding_never(kind: str, sessions: int) -> None:
    widths = [width for width in (0, 1, 2, 4, 8) if sessions * (width + 1) <= 64]
    speeds = {width: fixed(Machine(CPU), TEXTS[kind](sessions), ROUNDS, width) for width in widths}
    speed, _ = governed(Machine(CPU), TEXTS[kind](sessions), ROUNDS)
    assert speed >= 0.95 * max(speeds.values())
    assert speed >= 0.97 * speeds[0]


@pytest.mark.parametrize("sessions", [1, 8])
def test_a_drafter_that_costs_much_and_brings_nothing_is_hardly_asked(sessions: int) -> None:
    machine = Machine(CPU, draft_s=4e-3)
    speed, _ = governed(machine, TEXTS["wrong"](sessions), ROUNDS)
    assert speed >= 0.95 * fixed(Machine(CPU), TEXTS["wrong"](sessions), ROUNDS, 0)


def test_on_a_wide_machine_wide_trees_are_verified() -> None:
    narrow, _ = governed(Machine(CPU), TEXTS["good"](8), ROUNDS)
    wide, governor = governed(Machine(GPU), TEXTS["good"](8), ROUNDS)
    plain = fixed(Machine(GPU), TEXTS["good"](8), ROUNDS, 0)
    assert wide >= 0.95 * fixed(Machine(GPU), TEXTS["good"](8), ROUNDS, 6)
    assert wide > 2.0 * plain
    assert max(governor.rows, key=lambda rows: governor.rows[rows]) > 32
    assert narrow < 1.1 * fixed(Machine(CPU), TEXTS["good"](8), ROUNDS, 0)


@pytest.mark.parametrize("believed", [CostCurve((1, 64), (4e-3, 4e-3)), CostCurve((1, 64), (4e-3, 400e-3))])
def test_even_a_cost_curve_that_is_all_wrong_costs_little(believed: CostCurve) -> None:
    speed, _ = governed(Machine(CPU), TEXTS["good"](4), 4 * ROUNDS, believed)
    assert speed >= 0.9 * fixed(Machine(CPU), TEXTS["good"](4), ROUNDS, 0)


def test_a_cost_curve_that_is_somewhat_wrong_is_corrected() -> None:
    factors = (1.0, 1.0, 1.2, 0.7, 0.7, 0.7, 0.7)
    believed = CostCurve(CPU.rows, tuple(seconds * factor for seconds, factor in zip(CPU.seconds, factors)))
    best = max(fixed(Machine(CPU), TEXTS["good"](4), ROUNDS, width) for width in (0, 1, 2))
    speed, _ = governed(Machine(CPU), TEXTS["good"](4), 2 * ROUNDS, believed)
    assert speed >= 0.95 * best


def test_the_expected_speed_is_what_comes() -> None:
    _, governor = governed(Machine(CPU), TEXTS["good"](2), ROUNDS)
    assert governor.expected_tokens_per_s == pytest.approx(governor.measured_tokens_per_s, rel=0.12)


def test_a_slower_machine_changes_no_price() -> None:
    cost = LiveCost(CPU)
    for _ in range(500):
        cost.observe(1, 0.0, 3.0 * CPU.at(1), 0.0)
    assert cost.at(1) == pytest.approx(3.0 * CPU.at(1), rel=0.05)
    assert cost.at(16) / cost.at(1) == pytest.approx(CPU.at(16) / CPU.at(1), rel=0.1)


def test_one_interrupted_step_is_hardly_noticed() -> None:
    cost = LiveCost(CPU)
    cost.observe(8, 0.0, 1000.0 * CPU.at(8), 0.0)
    assert cost.at(8) < 1.2 * CPU.at(8)


def test_a_width_that_costs_otherwise_than_measured_is_learnt_and_reported_as_drift() -> None:
    cost = LiveCost(CPU)
    for at in range(2000):
        rows = (1, 8)[at % 2]
        cost.observe(rows, 0.0, CPU.at(rows) * (2.0 if rows == 8 else 1.0), 0.0)
    assert cost.at(8) / cost.at(1) == pytest.approx(2.0 * CPU.at(8) / CPU.at(1), rel=0.1)
    assert cost.drift > 1.5


def test_context_costs_what_was_measured() -> None:
    cost = LiveCost(CostCurve((1, 4), (1.0, 2.0), (0.001, 0.002), context=100))
    assert cost.rounds(1, 4, 1100.0) == pytest.approx([2.0, 2.0 + 2 / 3, 2.0 + 4 / 3, 4.0])
    assert cost.at(1) == pytest.approx(1.0)


def test_steps_of_many_sessions_teach_nothing_false_about_rows() -> None:
    curve = CostCurve((1, 8, 16), (1.0, 2.0, 3.0), (1e-3,) * 3, context=0, session_slope=1e-3)
    cost = LiveCost(curve)
    for at in range(500):
        rows, sessions = ((1, 1), (8, 8), (16, 8), (16, 1))[at % 4]
        cost.observe(rows, 500.0, curve.at(rows, 500.0, sessions), 0.0, sessions)
    assert cost.drift == pytest.approx(1.0, abs=1e-6)
    assert cost.at(16, 500.0, 8) - cost.at(8, 500.0, 8) == pytest.approx(1.0)


def test_a_gate_asks_everybody_until_something_is_known_and_again_now_and_then() -> None:
    gate = AskGate()
    names = ["pays", "does not"]
    asked = 0
    for _ in range(2000):
        chosen = gate.choose(names, 5e-3)
        if chosen:
            gate.asked(len(chosen), 0.5e-3 * len(chosen))
        if "pays" in chosen:
            gate.observe("pays", 1.0)
        if "does not" in chosen:
            gate.observe("does not", 0.0)
            asked += 1
        gate.tick(5e-3)
        assert "pays" in chosen
    assert 50 < asked < 300
    gate.forget("pays")
    assert gate._worth.keys() == {"does not"}


def test_a_gate_is_not_shut_by_slow_first_asks_nor_by_an_interrupted_one() -> None:
    gate = AskGate()

    def ask(times: int, seconds: float) -> None:
        for _ in range(times):
            assert gate.choose(["a"], 10e-3) == {"a"}
            gate.asked(1, seconds)
            gate.observe("a", 0.8)
            gate.tick(10e-3)

    ask(2, 1.5)  # pages of a datastore come from the disk
    ask(100, 0.5e-3)
    ask(1, 30.0)
    ask(100, 0.5e-3)
    assert gate.seconds_per_ask == pytest.approx(0.5e-3, rel=0.1)


def test_an_interrupted_round_hardly_moves_what_a_round_costs_beside_its_pass() -> None:
    cost = LiveCost(CPU)
    for at in range(300):
        cost.observe(1, 0.0, CPU.at(1), 20.0 if at == 200 else 0.5e-3)
    assert cost.overhead == pytest.approx(0.5e-3, rel=0.05)
    for _ in range(300):
        cost.observe(1, 0.0, CPU.at(1), 50e-3)
    assert cost.overhead == pytest.approx(50e-3, rel=0.05)


def test_the_forecast_is_what_the_simulation_measures() -> None:
    rng = np.random.default_rng(0)
    rounds = []
    for _ in range(400):
        tree, chances = Text([0.8] * 8, [0.75] * 8).tree(24)
        path = np.array(chances)
        for node, parent in enumerate(tree.parents.tolist()):
            path[node] *= path[parent] if parent >= 0 else 1.0
        rounds.append([path[rng.permutation(len(path))]])
    cost = LiveCost(CPU)
    expected = forecast(rounds, cost, 64)
    plain = fixed(Machine(CPU, 0.0, 0.0), TEXTS["good"](1), ROUNDS, 0)
    measured, _ = governed(Machine(CPU, 0.0, 0.0), TEXTS["good"](1), ROUNDS)
    assert expected.speedup == pytest.approx(measured / plain, rel=0.1)
    flat = forecast(rounds, LiveCost(flat_curve(CPU, 200)), 200)
    assert flat.speedup > expected.speedup
    assert flat.nodes_per_round > expected.nodes_per_round
    assert forecast([], cost, 64).speedup == 1.0


def test_a_curve_that_does_not_hold_is_reported_once() -> None:
    reports: list[str] = []
    governor = Governor(EngineConfig(), CPU)
    governor.on_drift = lambda: reports.append("drift")
    for at in range(4000):
        shape = Shape(1, (0, 7)[at % 2], 0, 0.0)
        seconds = CPU.at(shape.rows) * (1.0 if shape.nodes == 0 else 2.5)
        governor.observe("local", shape, 1, RoundSpent(0.0, seconds, 0.0, seconds))
    assert reports == ["drift"]

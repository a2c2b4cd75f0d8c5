"""The simulator: tokens are conserved, closed forms hold, drafters only cost time, and a seed decides everything."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import simulate
from benchmarks.simulation.deployment import CurveConfig, Deployment, changed, described
from benchmarks.simulation.fit import Sample, Watch, fit_forward, fit_rest
from benchmarks.simulation.prices import DraftPrice, Machine, Model, StepPrice, roofline, rows_cost
from benchmarks.simulation.record import record
from benchmarks.simulation.replay import Replay, Run, replay
from benchmarks.simulation.results import figures
from benchmarks.simulation.sizing import BASE, assumptions
from benchmarks.simulation.traces import WRONG, load_trace, synthetic
from benchmarks.simulation.validate import halves
from benchmarks.simulation.virtual_time import EventLoop, Process
from cluster.core.config import parse_config
from cluster.core.errors import ConfigError
from cluster.core.token_tree import TokenTree
from cluster.engine.step_cost import CostCurve
from cluster.rounds.governor import Shape

ROWS = [1, 2, 4, 8, 16, 32, 64]
SECONDS = [7.0e-3, 7.2e-3, 7.6e-3, 9.0e-3, 15e-3, 27e-3, 52e-3]
CURVE = {"rows": ROWS, "seconds": SECONDS}
GOOD = {"rates": [0.7, 0.1], "depth": 8}
USELESS = {"rates": [0.7, 0.1], "depth": 8, "holds": 0.0}
POOL = {"name": "medium", "workers": 2, "trace": GOOD, "call_s": 1e-3}
OWN = {"trace": GOOD, "session_s": 0.1e-3}


def deployment(sessions: int = 4, requests: int = 12, output: int = 64, **changes: Any) -> dict[str, Any]:
    base = {
        "target": {"curve": CURVE, "engine": {"max_rows": 64, "kv_slots": 8}, "rest_s": [0.2e-3, 0.0, 0.0]},
        "workload": {
            "sessions": sessions,
            "requests": requests,
            "prompt_tokens": [16],
            "output_tokens": [output, output + 1],
        },
    }
    return base | changes


def run(data: dict[str, Any]) -> Replay:
    return replay(parse_config(Deployment, data))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"local_drafter": OWN},
        {"stages": [POOL]},
        {"local_drafter": OWN, "stages": [{**POOL, "name": "small"}, POOL]},
        {"workload": {"rate": 20.0, "requests": 12, "prompt_tokens": [5, 90], "output_tokens": [64, 65]}},
    ],
    ids=["plain", "own drafter", "pool", "chain of pools", "random arrivals"],
)
def test_every_request_gets_exactly_its_tokens(changes: dict[str, Any]) -> None:
    found = run(deployment(**changes))
    assert sorted(one.tokens for one in found.served) == [64] * 6 + [65] * 6
    for one in found.served:
        assert one.finished
        assert one.tokens == one.rounds + one.accepted  # every round yields a bonus token
        assert one.accepted <= one.drafted
        times = [at for at, _ in one.items]
        assert times == sorted(times)
        assert times[0] >= one.arrived_s


@pytest.mark.parametrize("sessions", [1, 4])
def test_plain_decoding_takes_what_the_curve_says(sessions: int) -> None:
    found = run(deployment(sessions, requests=sessions, output=100) | {"target": {"curve": CURVE}})
    lasts = sorted(at for one in found.served for at, _ in one.items[-1:])
    first = CostCurve(tuple(ROWS), tuple(SECONDS)).at(16 * sessions)
    each = CostCurve(tuple(ROWS), tuple(SECONDS)).at(sessions)
    assert lasts[0] == pytest.approx(first + 99 * each)


def test_with_a_noiseless_clock_tokens_a_round_are_those_of_a_walk_along_the_trace() -> None:
    trace = synthetic([0.6, 0.2], 4, sessions=1, output_tokens=80, stage=1, seed=3)
    position, rounds = 1, 1  # the prompt's own step yields the first token
    while position < 80:
        position += min(int(trace.sessions[0].offers[position].hits.sum()), 80 - position - 1) + 1
        rounds += 1
    data = deployment(1, requests=1, output=80, local_drafter={"trace": {"rates": [0.6, 0.2], "depth": 4}})
    data["target"]["engine"] |= {"governor": "always", "max_nodes": 24}
    parsed = parse_config(Deployment, data)
    assert parsed.local_drafter is not None
    found = replay(parsed, {parsed.local_drafter.trace: trace})
    assert [one.rounds for one in found.served] == [rounds]


@pytest.mark.parametrize("sessions", [1, 4, 8])
@pytest.mark.parametrize(
    "changes",
    [{"local_drafter": {"trace": USELESS}}, {"stages": [{**POOL, "trace": USELESS}]}],
    ids=["own drafter", "pool"],
)
def test_guesses_that_never_hold_cost_what_the_governor_promises(changes: dict[str, Any], sessions: int) -> None:
    size: dict[str, Any] = {"sessions": sessions, "requests": 2 * sessions, "output": 400}
    plain, wrong = run(deployment(**size)), run(deployment(**size, **changes))
    assert sum(one.accepted for one in wrong.served) == 0
    assert wrong.seconds <= plain.seconds / 0.95


def test_guesses_that_hold_make_it_faster() -> None:
    plain = run(deployment(1, requests=2, output=400))
    for changes in ({"local_drafter": OWN}, {"stages": [POOL]}):
        assert run(deployment(1, requests=2, output=400, **changes)).seconds < 0.75 * plain.seconds


@pytest.mark.parametrize(
    "fault",
    [{"kind": "death"}, {"kind": "death", "for_s": 0.5}, {"kind": "hang", "for_s": 0.7}],
    ids=["gone", "restarted", "hung"],
)
def test_a_dead_or_hung_drafter_loses_nothing(fault: dict[str, Any]) -> None:
    size: dict[str, Any] = {"sessions": 2, "requests": 6, "output": 300}
    faults = [{"at_s": 0.9, "stage": "medium", "worker": worker, **fault} for worker in (0, 1)]
    plain, struck = run(deployment(**size)), run(deployment(**size, stages=[POOL], faults=faults))
    assert sorted(one.tokens for one in struck.served) == sorted(one.tokens for one in plain.served)
    assert struck.seconds <= 1.3 * plain.seconds
    medium = figures(struck)["stages"]["medium"]
    assert medium["busy"] > 0.0
    if "for_s" in fault:  # it was asked while it could not answer; one that is gone is not asked
        assert medium["deadline_misses"] > 0


def test_a_worker_that_is_gone_leaves_its_sessions_to_the_others() -> None:
    faults = [{"at_s": 0.9, "stage": "medium", "worker": 0}]
    found = run(deployment(2, requests=2, output=1500, stages=[POOL], faults=faults))
    dead, alive = found.pools["medium"].workers
    assert dead.busy_s < 1.0
    assert alive.busy_s > dead.busy_s
    assert (dead.leases, alive.leases) == (0, 0)  # all given back in the end


def test_a_pool_shared_by_more_targets_is_busier_and_serves_all() -> None:
    busy = []
    for targets in (1, 3):
        target = deployment()["target"] | {"replicas": targets}
        found = run(deployment(1, requests=1, output=300, target=target, stages=[{**POOL, "workers": 1}]))
        assert [one.tokens for one in found.served] == [300, 301, 300][:targets]
        busy.append(figures(found)["stages"]["medium"]["busy"])
    assert busy[1] > 1.5 * busy[0] > 0.0


def test_the_same_seed_gives_the_same_figures_and_another_one_does_not() -> None:
    target = deployment()["target"] | {"noise": 0.1}
    data = deployment(local_drafter=OWN, stages=[POOL], target=target)
    first, again, other = (figures(run(data | {"seed": seed})) for seed in (1, 1, 2))
    assert first == again
    assert first["seconds"] != other["seconds"]


def test_figures_are_what_happened() -> None:
    found = run(deployment(1, requests=1, output=10))
    result = figures(found)
    assert result["tokens"] == 10
    assert result["tokens_per_s"] == pytest.approx(10 / found.seconds, rel=1e-3)
    assert result["first_token_ms"]["p50"] == pytest.approx(1e3 * (0.0150 + 0.2e-3))
    assert result["inter_token_ms"]["p50"] == pytest.approx(7.2)
    assert result["tokens_per_round"] == 1.0
    json.dumps(result)


def test_requests_beyond_the_queue_are_counted_as_refused() -> None:
    data = deployment(workload={"rate": 1000.0, "requests": 30, "prompt_tokens": [16], "output_tokens": [50]})
    data["target"]["engine"] |= {"kv_slots": 2, "max_waiting": 3}
    result = figures(run(data))
    assert result["refused"] > 0
    assert result["requests"] + result["refused"] == 30
    assert result["unfinished"] == 0


def test_a_trace_is_the_same_after_being_kept_and_holds_no_text(tmp_path: Path) -> None:
    trace = synthetic([0.5, 0.2], 3, sessions=3, output_tokens=20)
    trace.save(tmp_path / "trace.npz")
    loaded = load_trace(tmp_path / "trace.npz")
    assert loaded.source == trace.source
    for old, new in zip(trace.sessions, loaded.sessions, strict=True):
        assert (old.prompt_tokens, old.output_tokens) == (new.prompt_tokens, new.output_tokens)
        for left, right in zip(old.offers, new.offers, strict=True):
            assert left.parents.tolist() == right.parents.tolist()
            assert left.hits.tolist() == right.hits.tolist()
            assert left.scores == pytest.approx(right.scores, rel=0.03)
    with np.load(tmp_path / "trace.npz") as data:
        assert not [name for name in data.files if "token" in name and name not in ("prompt_tokens", "output_tokens")]


def test_an_offer_carries_the_outputs_tokens_along_its_hits_and_wrong_ones_elsewhere() -> None:
    class Guesser:
        """Two children a level: the first guess is the record's token plus one, the second is right."""

        stage, vocab_size = 2, None
        base = 0

        def begin(self, session_id: str, token_ids: list[int], *rest: Any) -> None:
            self.base = len(token_ids)

        def propose(self, asks: Any, upstream: Any) -> dict[str, TokenTree]:
            at = self.base
            return {asks[0].session_id: TokenTree.build([at + 1, at, at + 1], [-1, -1, 1], [0.5, 0.4, 0.3], 2)}

        def commit(self, session_id: str, token_ids: list[int]) -> None:
            self.base += len(token_ids)

        def end(self, session_id: str) -> None: ...

    answer = {"prompt_token_ids": [7, 7], "token_ids": [2, 3, 4, 5]}
    session = record([answer], Guesser(), 8, {}).sessions[0]  # type: ignore[arg-type]
    assert [offer.hits.tolist() for offer in session.offers] == [[], *[[False, True, True]] * 2, [False, True, False]]
    tree = session.offer(1).tree(1, 8, 8)
    assert tree.tokens.tolist() == [WRONG, 1, 2]
    assert session.offer(4) is session.offers[1]  # a longer replay begins anew


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("workload.session=3", "session"),
        ("workload.rate=3", "either sessions or rate"),
        ("target.curve.rows=[4, 1]", "rows"),
        ("stages.0.name=huge", "huge"),
        ("stages.0.trace.file=nowhere.npz", "either file or rates"),
        ("faults=[{at_s: 1, stage: medium, worker: 7}]", "no worker 7"),
        ("workload.output_tokens=[9999]", "max_model_len"),
        ("stages.5.name=small", "no such key"),
        ("seed", "NAME=VALUE"),
    ],
)
def test_a_wrong_setting_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(json.dumps(deployment(stages=[POOL])))
    assert simulate.main([str(file), "--set", setting]) == 2
    assert message in capsys.readouterr().err


def test_a_file_without_a_trace_or_a_deployment_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(json.dumps(deployment(local_drafter={"trace": {"file": str(file)}})))
    assert simulate.main([str(file)]) == 2
    assert "holds no acceptance trace" in capsys.readouterr().err
    assert simulate.main([str(tmp_path / "nothing.yaml")]) == 2
    assert "nothing.yaml" in capsys.readouterr().err


def test_the_command_prints_figures_and_ends_with_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(json.dumps(deployment()))
    assert simulate.main([str(file), "--set", "workload.requests=5", "--out", str(tmp_path / "out.json")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["requests"] == 5
    assert last["deployment"]["workload"]["requests"] == 5
    assert "revision" in last
    assert json.loads((tmp_path / "out.json").read_text())["tokens"] == last["tokens"]


def test_settings_change_what_they_name_and_nothing_else() -> None:
    data = deployment(stages=[POOL])
    new = changed(data, ["stages.0.workers=5", "network.hop_s=0.002"])
    assert new["stages"][0]["workers"] == 5
    assert new["network"] == {"hop_s": 0.002}
    assert data["stages"][0]["workers"] == 2


def test_every_key_is_listed() -> None:
    names = {line.split()[0] for line in described(Deployment)}
    assert {"seed", "stages.0.workers", "target.engine.max_nodes", "workload.rate", "faults.0.kind"} <= names
    assert {"target.curve.model.layers", "target.curve.machine.bandwidth"} <= names


def test_a_roofline_is_memory_first_and_arithmetic_beyond() -> None:
    model = Model(parameters=1e9, layers=10, kv_heads=2, head_dim=64, width=1024)
    machine = Machine(bandwidth=1e12, flops=1e14, bandwidth_share=1.0, flops_share=1.0, launch=0.0)
    curve = roofline(model, machine, 512)
    assert curve.at(1) == pytest.approx(2e-3)
    assert curve.at(64) == pytest.approx(2e-3)
    assert curve.at(512) == pytest.approx(512 * 2e9 / 1e14)
    pair = roofline(model, machine.model_copy(update={"count": 2, "all_reduce": 1e-5}), 512)
    assert pair.at(1) == pytest.approx(1e-3 + 20e-5, rel=0.01)


def test_a_curve_that_the_engine_kept_is_the_targets(tmp_path: Path) -> None:
    kept = CostCurve((1, 64), (2e-3, 4e-3), (1e-6, 1e-6), 64)
    (tmp_path / "curve.json").write_text(json.dumps(asdict(kept)))
    data = deployment(1, requests=1, output=11, target={"curve": {"file": str(tmp_path / "curve.json")}})
    found = run(data)
    assert found.targets[0].scheduler.governor.cost.curve == kept
    assert found.seconds == pytest.approx(kept.at(16) + 10 * kept.at(1))


def test_a_measured_curve_is_written_down_whole() -> None:
    measured = CostCurve((1, 64), (2e-3, 4e-3), (1e-6, 2e-6), 64, 1e-6)
    assert CurveConfig(**asdict(measured)).curve(64) == measured


def test_more_rows_than_the_widest_step_are_several_steps() -> None:
    curve = CostCurve((1, 10), (1.0, 2.0))
    assert rows_cost(curve, 10) == 2.0
    assert rows_cost(curve, 25) == pytest.approx(2 * 2.0 + np.interp(5, (1, 10), (1.0, 2.0)))
    price = DraftPrice(call=0.5, session=0.1, curve=curve, passes=3, rows=2)
    assert price.seconds(2, 1) == pytest.approx(0.5 + 0.2 + 1.0 + 2 * np.interp(4, (1, 10), (1.0, 2.0)))


def test_fitted_prices_are_those_the_rounds_were_made_with() -> None:
    truth = StepPrice(CostCurve(tuple(ROWS), tuple(SECONDS)), factor=1.3, position=2e-7, prompt_row=0.8)
    random = np.random.default_rng(0)
    samples = []
    for _ in range(400):
        sessions, nodes, prompts = (int(random.integers(1, high)) for high in (8, 16, 30))
        shape = Shape(sessions, nodes, prompts * int(random.random() < 0.3), float(random.uniform(50, 1500)))
        samples.append(Sample(shape, 0.0, 0.0, truth.forward(shape) * float(np.exp(0.02 * random.normal())), 0.0))
    found = fit_forward(samples, truth.curve)
    for one in samples:
        assert found.forward(one.shape) == pytest.approx(truth.forward(one.shape), rel=0.03)
    assert found.prompt_row == pytest.approx(0.8, abs=0.11)


def test_prices_fitted_to_an_engine_whose_prices_are_known_predict_it() -> None:
    data = deployment(4, requests=24, output=40)
    data["target"] |= {"noise": 0.05, "factor": 1.2, "position_s": 3e-7, "choosing_s": [1e-4, 2e-5]}
    data["workload"]["prompt_tokens"] = [300, 20, 90]
    engine, watch = Run(parse_config(Deployment, data), lambda config: synthetic([0.5], 2)), Watch()
    watch.attach(engine.targets[0].scheduler)
    seconds = engine.run().seconds
    assert watch.seconds == pytest.approx(seconds)
    price = fit_rest(fit_forward(watch.samples, CostCurve(tuple(ROWS), tuple(SECONDS))), watch)
    data["target"] |= {
        "noise": 0.0,
        "factor": price.factor,
        "position_s": price.position,
        "prompt_row": price.prompt_row,
        "choosing_s": [price.choosing, price.choosing_session],
        "rest_s": [price.rest, price.rest_session, price.rest_row],
    }
    assert run(data).seconds == pytest.approx(seconds, rel=0.03)


def test_halves_share_no_prompt_and_every_category() -> None:
    lines = [{"category": name, "n": n} for name in ("a", "b", "c") for n in range(4)]
    fit, test = halves(lines)
    assert [(line["category"], line["n"]) for line in fit] == [(c, n) for c in "abc" for n in (0, 2)]
    assert [(line["category"], line["n"]) for line in test] == [(c, n) for c in "abc" for n in (1, 3)]


def test_processes_and_events_happen_in_the_order_of_virtual_time() -> None:
    loop, seen = EventLoop(), []

    def life(name: str, naps: list[float]) -> None:
        for nap in naps:
            process[name].sleep(nap)
            seen.append((name, loop.now))
        process[name].wait()

    process: dict[str, Process] = {}
    for name, naps in (("a", [1.0, 2.0]), ("b", [2.0, 2.0])):
        process[name] = Process(loop, lambda name=name, naps=naps: life(name, naps), name)  # type: ignore[misc]
    loop.at(2.5, lambda: seen.append(("event", loop.now)))
    loop.run(lambda: False)
    for one in process.values():
        one.stop()
    assert seen == [("a", 1.0), ("b", 2.0), ("event", 2.5), ("a", 3.0), ("b", 4.0)]


def test_an_error_inside_a_process_reaches_whoever_runs_the_loop() -> None:
    loop = EventLoop()

    def fail() -> None:
        raise ConfigError("no")

    process = Process(loop, fail, "failing")
    with pytest.raises(ConfigError, match="no"):
        loop.run(lambda: False)
    process.stop()


def test_the_sizing_page_states_what_its_base_says() -> None:
    from benchmarks.simulation.deployment import read_file

    text = assumptions(read_file(BASE))
    for fact in ("70.6 billion", "4 accelerators", "3.35 TB/s", "0.9 ms a hop", "smollm2_sssd.npz", "chance 0.7,"):
        assert fact in text

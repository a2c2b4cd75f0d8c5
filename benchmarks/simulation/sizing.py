"""The sizing page: the same deployment with more drafters, sessions and targets, and what it rests on."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.simulation.deployment import CurveConfig, Deployment, read_file
from benchmarks.simulation.prices import Machine, Model
from benchmarks.simulation.replay import replay
from benchmarks.simulation.results import figures
from cluster.core.config import parse_config
from cluster.core.errors import ConfigError
from cluster.rounds.modes import FROM_STAGES

BASE = Path(__file__).with_name("llama70b_tp4.yaml")
BASE_NAME = "benchmarks/simulation/llama70b_tp4.yaml"
COMMAND = "python -m benchmarks.simulate --sizing docs/sizing.md"
PLAIN, OWN, POOL = "plain", "the n-gram drafter", "a pool of"

ENOUGH = 0.97
FEW = 16  # sessions; where more run at once, fewer waves of them show as much

Cells = dict[tuple[int, str], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Grid:
    """What is varied. ``shared_sessions``: on each of the targets that share a pool."""

    sessions: Sequence[int] = (1, 4, 16, 64, 256, 1000)
    workers: Sequence[int] = (1, 2, 4, 8, 16)
    targets: Sequence[int] = (1, 2, 5, 10, 20, 50)
    shared_workers: Sequence[int] = (4, 16)
    shared_sessions: int = 2
    waves: int = 3  # requests one after the other in the place of each session, where sessions are few


QUICK = Grid(sessions=(1, 16), workers=(1, 4), targets=(1, 4), shared_workers=(4,), waves=2)


def write_page(path: Path, quick: bool = False) -> dict[str, Any]:
    """Simulate every cell and write the page; returns all figures."""
    grid, base = QUICK if quick else Grid(), read_file(BASE)
    alone = {
        (sessions, name): _cell(base, sessions, **options)
        for sessions in grid.sessions
        for name, options in _variants(grid.workers, grid.waves).items()
    }
    shared = {
        (targets, f"{POOL} {workers}"): _cell(
            base, grid.shared_sessions, workers=workers, targets=targets, waves=grid.waves
        )
        for targets in grid.targets
        for workers in grid.shared_workers
    }
    path.write_text(_page(base, grid, alone, shared, f"{COMMAND}{' --quick' * quick}"))
    return {
        "one_target": [{"sessions": sessions, "drafting": name, **cell} for (sessions, name), cell in alone.items()],
        "shared_pool": [{"targets": targets, "drafting": name, **cell} for (targets, name), cell in shared.items()],
    }


def _variants(workers: Sequence[int], waves: int) -> dict[str, dict[str, Any]]:
    pools = {f"{POOL} {count}": {"workers": count, "waves": waves} for count in workers}
    return {PLAIN: {"waves": waves}, OWN: {"own": True, "waves": waves}, **pools}


def _cell(
    base: Mapping[str, Any], sessions: int, *, own: bool = False, workers: int = 0, targets: int = 1, waves: int
) -> dict[str, Any]:
    """One deployment's figures: ``base`` with so much of everything."""
    running = min(sessions, base["target"]["engine"]["kv_slots"])
    requests = max(4, waves * running) if running <= FEW else running + running // 2
    deployment = {
        **base,
        "target": {**base["target"], "replicas": targets},
        "local_drafter": base["local_drafter"] if own else None,
        "stages": [{**stage, "workers": workers} for stage in base["stages"]] if workers else [],
        "workload": {**base["workload"], "sessions": sessions, "requests": requests},
    }
    found = figures(replay(parse_config(Deployment, deployment)))
    print(
        f"{targets} x {sessions} sessions, {workers} workers: {found['steady_tokens_per_s']:.0f} tokens/s",
        file=sys.stderr,
    )
    return found


def _page(base: Mapping[str, Any], grid: Grid, alone: Cells, shared: Cells, command: str) -> str:
    names = list(_variants(grid.workers, grid.waves))
    pools = [f"{POOL} {count}" for count in grid.shared_workers]
    parts = [
        "# How many drafters?",
        f"Written by `{command}` from `{BASE_NAME}`: what a 70B target on four accelerators gains from drafters, by the"
        " simulator (`benchmarks/simulate.py`), which runs the service's own scheduler, governor, pipeline and draft"
        " workers in virtual time. **Nothing on this page was measured on such machines.** How far the simulator can be"
        " trusted where it can be checked stands in `benchmarks/results/simulation_validation.json`. Change the file to"
        " your hardware and your drafter's acceptance, and run the command again.",
        "## What it rests on",
        assumptions(base),
        "## One target: tokens per second",
        "All sessions together, in the middle of the run; in brackets against plain decoding. A pool is used alone"
        " here, without the n-gram drafter in the target's own process, so that its own worth shows.",
        _table("sessions", grid.sessions, names, lambda row, name: _speed(alone, row, name, PLAIN)),
        "## One target: what a session sees",
        "Median milliseconds between tokens of a session.",
        _table("sessions", grid.sessions, names, lambda row, name: f"{alone[row, name]['inter_token_ms']['p50']:.1f}"),
        "## One target: what the drafters do",
        "How busy a draft worker is · share of rounds in which the governor used the pool · share of wanted trees that"
        " were in the outcome cache already.",
        _table("sessions", grid.sessions, names[2:], lambda row, name: _pool(alone[row, name])),
        f"## One pool for many targets, {grid.shared_sessions} sessions on each",
        "Tokens per second of all targets together, in brackets those of one · how busy a draft worker is · share of"
        " wanted trees that did not come in time.",
        _table("targets", grid.targets, pools, lambda row, name: _shared(shared[row, name], row)),
        "## How to read it",
        reading(base, grid, alone, shared),
    ]
    return "\n\n".join(parts) + "\n"


def assumptions(base: Mapping[str, Any]) -> str:
    """Every assumption, from the file the page is made from."""
    deployment = parse_config(Deployment, dict(base))
    target, stage = deployment.target, deployment.stages[0]
    model, machine = _made_of(target.curve)
    small, on = _made_of(stage.curve)
    price, draft = target.price(), stage.price()
    step = {rows: 1e3 * price.curve.at(rows) for rows in (1, 64, 256, 1024)}
    own = deployment.local_drafter
    assert own is not None
    lines = [
        f"* *Target*: {model.parameters / 1e9:.1f} billion weights of {model.bytes_per_weight:g} bytes on"
        f" {machine.count} accelerators of {machine.bandwidth / 1e12:g} TB/s and {machine.flops / 1e12:g} TFLOP/s, of"
        f" which {machine.bandwidth_share:.0%} and {machine.flops_share:.0%} are reached; two all-reduces a layer of"
        f" {1e6 * machine.all_reduce:g} µs and {machine.link / 1e9:g} GB/s; {1e3 * machine.launch:g} ms to launch a"
        f" step. That makes {', '.join(f'{ms:.1f} ms at {rows} rows' for rows, ms in step.items())}; each"
        f" session's K/V adds {1e9 * price.position:.1f} µs per 1,000 positions. Steps vary by {price.noise:.0%}.",
        f"* *Engine*: {target.engine.kv_slots} sessions run at once and the others wait, up to"
        f" {target.engine.max_rows} rows a step, trees of {target.engine.max_nodes} nodes and"
        f" {target.engine.run_ahead_nodes} more to run ahead. Around a step"
        f" {1e3 * (price.choosing + price.rest):.1f} ms, and"
        f" {1e6 * (price.choosing_session + price.rest_session):.0f} µs a session.",
        f"* *The n-gram drafter*: SSSD in the target's process, {1e3 * own.session_s:g} ms a tree; acceptance as"
        " recorded with SmolLM2-135M on 26 Spec-Bench questions (`benchmarks/traces/smollm2_sssd.npz`). A 70B model"
        " repeats itself less: take this column as an upper bound.",
        f"* *Pool*: each worker runs a {small.parameters / 1e9:.2g} billion model on an accelerator of"
        f" {on.bandwidth / 1e12:g} TB/s and {on.flops / 1e12:g} TFLOP/s; {stage.passes} passes make a tree:"
        f" {1e3 * draft.seconds(1, 3):.1f} ms for one session, {1e3 * draft.seconds(16, 48):.1f} ms for 16 of one"
        f" target at once. Acceptance is synthetic: the likeliest child is right with chance {stage.trace.rates[0]:g},"
        f" the next {', '.join(f'{rate:g}' for rate in stage.trace.rates[1:])}, at every depth down to"
        f" {stage.trace.depth}, and the drafter knows these chances.",
        f"* *Network*: {1e3 * deployment.network.hop_s:g} ms a hop, varying by {deployment.network.jitter:.0%}.",
        f"* *Load*: a closed loop of prompts of {deployment.workload.prompt_tokens[0]} tokens, answers of"
        f" {deployment.workload.output_tokens[0]}; no prefix is shared. Where more sessions than"
        f" {target.engine.kv_slots} are asked for, half as many again wait throughout. The"
        " governor begins knowing nothing of what guesses are worth.",
    ]
    return "\n".join(lines)


def _made_of(curve: CurveConfig | None) -> tuple[Model, Machine]:
    if curve is None or curve.model is None or curve.machine is None:
        raise ConfigError(f"{BASE_NAME}: the sizing page needs curves given as model and machine")
    return curve.model, curve.machine


def reading(base: Mapping[str, Any], grid: Grid, alone: Cells, shared: Cells) -> str:
    """What the figures say, in words that follow from them."""
    slots, lines = base["target"]["engine"]["kv_slots"], []
    for sessions in grid.sessions:
        plain = alone[sessions, PLAIN]["steady_tokens_per_s"]
        gains = {name: alone[sessions, name]["steady_tokens_per_s"] / plain for name in _variants(grid.workers, 1)}
        best = max(gains, key=lambda name: gains[name])
        enough = next((n for n in grid.workers if gains[f"{POOL} {n}"] >= ENOUGH * _most(gains)), grid.workers[-1])
        lines.append(
            f"* {sessions:,} session{'s' * (sessions > 1)}: fastest with {best} ({gains[best]:.2f} × plain)."
            f" Of a pool, {enough} worker{'s' * (enough > 1)} bring{'s' * (enough == 1)} what more of them would"
            f" ({gains[f'{POOL} {enough}']:.2f} ×)."
        )
    for workers in grid.shared_workers:
        speeds = {n: shared[n, f"{POOL} {workers}"]["steady_tokens_per_s"] / n for n in grid.targets}
        served = max(n for n, speed in speeds.items() if speed >= ENOUGH * speeds[grid.targets[0]])
        lines.append(f"* A pool of {workers} serves {served} such targets as fast as one ({ENOUGH:.0%} of its speed).")
    lines.append(
        f"* Beyond {slots} sessions the others wait for a slot: what they need is another target, not a drafter."
    )
    return "\n".join(lines)


def _most(gains: Mapping[str, float]) -> float:
    return max(gain for name, gain in gains.items() if name.startswith(POOL))


def _speed(cells: Cells, row: int, name: str, against: str) -> str:
    speed, base = cells[row, name]["steady_tokens_per_s"], cells[row, against]["steady_tokens_per_s"]
    return f"{speed:,.0f}" if name == against else f"{speed:,.0f} ({speed / base:.2f})"


def _pool(cell: Mapping[str, Any]) -> str:
    stage, modes = next(iter(cell["stages"].values())), cell["rounds_by_mode"]
    used = sum(modes.get(mode, 0) for mode in FROM_STAGES) / max(1, sum(modes.values()))
    return f"{stage['busy']:.0%} · {used:.0%} · {stage['from_cache']:.0%}"


def _shared(cell: Mapping[str, Any], targets: int) -> str:
    stage, speed = next(iter(cell["stages"].values())), cell["steady_tokens_per_s"]
    return f"{speed:,.0f} ({speed / targets:,.0f}) · {stage['busy']:.0%} · {stage['without_tree']:.0%}"


def _table(corner: str, rows: Sequence[int], columns: Sequence[str], cell: Any) -> str:
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---:|" + "---:|" * len(columns)]
    lines += [f"| {row:,} | {' | '.join(cell(row, name) for name in columns)} |" for row in rows]
    return "\n".join(lines)

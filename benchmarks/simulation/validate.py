"""Is the simulator right? Real offline runs on half of the prompts, beside what it predicts from the other half.

Both halves run at once, taking turns request by request, each with an engine of its own over the same weights: what the
machine's speed does meanwhile, it does to both. The prices of steps, draft calls and what is around them and the
acceptance trace come from the fit half alone; of the test half the simulator knows how long prompts and answers are.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import offline
from benchmarks.prompts import spread
from benchmarks.provenance import provenance
from benchmarks.simulation.deployment import (
    CurveConfig,
    Deployment,
    LocalDrafterConfig,
    TargetConfig,
    TraceConfig,
    WorkloadConfig,
)
from benchmarks.simulation.fit import Watch, at_level, fit_forward, fit_rest
from benchmarks.simulation.prices import StepPrice
from benchmarks.simulation.record import drafter_for, record
from benchmarks.simulation.replay import replay
from benchmarks.simulation.results import figures
from benchmarks.simulation.traces import Trace
from cluster.assemble import Target, build_scheduler, load_target
from cluster.core.config import EngineConfig
from cluster.core.errors import ConfigError

CONCURRENCIES = (1, 4, 8)
DRAFTERS = ("none", "sssd")
TRACE_NODES = 48
TRACE = TraceConfig(rates=(0.5,))  # stands for the recorded trace, which is in memory
WITHIN = 0.15
REPLAYS = 3  # of each prediction, with other noise

Answers = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Half:
    """One half's run: its answers, seconds, and rounds as watched."""

    answers: Answers
    seconds: float
    watch: Watch

    @property
    def tokens(self) -> int:
        return sum(len(answer["token_ids"]) for answer in self.answers)


Pair = tuple[Half, Half]  # fit, test
Cell = tuple[str, int]  # drafter, concurrency


def validate(args: argparse.Namespace) -> dict[str, Any]:
    """The comparison, as JSON. ``args``: prompts, limit, max_tokens, runs, model. Raises ``ConfigError``."""
    flags = [f"--prompts={args.prompts}", f"--model={args.model}", f"--max-tokens={args.max_tokens}"]
    flags += [f"--concurrency={2 * max(CONCURRENCIES)}"]  # KV slots for both halves at once
    options = {drafter: offline.parse_args([*flags, f"--drafters={drafter}"]) for drafter in DRAFTERS}
    engine = offline.engine_config(options["none"])
    lines = spread(offline.read_lines(args.prompts, None), args.limit)
    if not all(halves(lines)):
        raise ConfigError(f"--limit {args.limit}: no category has two prompts, which leaves no test half")
    with closing(load_target(offline.model_config(options["none"]), engine)) as target:
        sssd = drafter_for("sssd", args.model)
        runs = {
            (drafter, concurrency): _run_halves(options[drafter], target, engine, lines, concurrency, args.runs)
            for concurrency in CONCURRENCIES
            for drafter in DRAFTERS
        }
        answers = {answer["id"]: answer for answer in runs["none", 1][0].answers}
    trace = record(sorted(answers.values(), key=_number), sssd, TRACE_NODES, {"drafter": "sssd"})
    return _table(args, runs, trace, target, engine)


def halves(lines: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every other line of each category; the first goes to the fit half."""
    seen: dict[str, int] = {}
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for line in lines:
        category = str(line.get("category"))
        seen[category] = seen.get(category, -1) + 1
        parts[seen[category] % 2].append(line)
    return parts


def _run_halves(
    args: argparse.Namespace,
    target: Target,
    engine: EngineConfig,
    lines: Sequence[dict[str, Any]],
    concurrency: int,
    runs: int,
) -> Pair:
    """Both halves, in turns: a request of one, then of the other. Warm-up requests are not counted."""
    parts = [[offline.to_request(at, line, target, args) for at, line in enumerate(part)] for part in halves(lines)]
    size = engine.model_copy(update={"kv_slots": concurrency, "prefix_reuse": False})  # none is simulated
    schedulers = [build_scheduler(target, size, offline.drafter_stage(args)) for _ in parts]
    for scheduler, requests in zip(schedulers, parts):
        for _ in offline.generate(scheduler, target, requests[:concurrency], concurrency):
            pass
    watches = [Watch() for _ in parts]
    for watch, scheduler in zip(watches, schedulers):
        watch.attach(scheduler)
    found: list[Answers] = [[], []]
    seconds = [0.0, 0.0]
    for _ in range(runs):
        streams = [offline.generate(s, target, requests, concurrency) for s, requests in zip(schedulers, parts)]
        for _ in range(max(map(len, parts))):
            for side, stream in enumerate(streams):
                start = time.perf_counter()
                answer = next(stream, None)
                seconds[side] += time.perf_counter() - start
                if answer is not None:
                    found[side].append(answer)
    for side, watch in enumerate(watches):
        watch.outside = max(0.0, seconds[side] - watch.seconds)
    fit, test = (Half(answers, spent, watch) for answers, spent, watch in zip(found, seconds, watches))
    print(f"{args.drafters} x {concurrency}: {test.tokens / test.seconds:.1f} tokens/s", file=sys.stderr)
    return fit, test


def _table(
    args: argparse.Namespace, runs: dict[Cell, Pair], trace: Trace, target: Target, engine: EngineConfig
) -> dict[str, Any]:
    everything = [sample for fit, _ in runs.values() for sample in fit.watch.samples]
    price = fit_forward(everything, target.curve)
    rows = []
    for (drafter, concurrency), (fit, test) in runs.items():
        whole = fit_rest(price, fit.watch)
        own = at_level(whole, fit.watch.samples)
        measured = test.tokens / test.seconds
        predicted = _predict(own, drafter, fit, test, trace, engine, concurrency)
        one_level = _predict(whole, drafter, fit, test, trace, engine, concurrency)
        rows.append(
            {
                "drafter": drafter,
                "concurrency": concurrency,
                "measured_tokens_per_s": round(measured, 2),
                "predicted_tokens_per_s": round(predicted["tokens_per_s"], 2),
                "error": round(predicted["tokens_per_s"] / measured - 1.0, 4),
                "error_at_one_level": round(one_level["tokens_per_s"] / measured - 1.0, 4),
                "measured_tokens_per_round": round(test.tokens / sum(a["rounds"] for a in test.answers), 3),
                "predicted_tokens_per_round": round(predicted["tokens_per_round"], 3),
                "fit_half_tokens_per_s": round(fit.tokens / fit.seconds, 2),
            }
        )
    worst = max(abs(row["error"]) for row in rows)
    return {
        "rows": rows,
        "worst_error": worst,
        "within_15_percent": worst <= WITHIN,
        "fit": {
            "prompts": len(trace.sessions),
            "rounds": len(everything),
            "factor": round(price.factor, 4),
            "us_per_1000_positions": round(1e9 * price.position, 2),
            "prompt_row": round(price.prompt_row, 3),
            "noise": round(price.noise, 3),
        },
        "curve_ms": {r: round(1e3 * s, 3) for r, s in zip(target.curve.rows, target.curve.seconds)},
        "settings": {
            "prompts": args.prompts.name,
            **{name: getattr(args, name) for name in ("limit", "max_tokens", "runs", "model")},
        },
        **provenance(),
    }


def _predict(
    price: StepPrice, drafter: str, fit: Half, test: Half, trace: Trace, engine: EngineConfig, concurrency: int
) -> dict[str, float]:
    """Means over ``REPLAYS`` replays of the test half's lengths, with the fit half's prices and trace."""
    requests = sorted(test.answers, key=_number)
    runs = max(1, len(requests) // len({answer["id"] for answer in requests}))
    requests = requests[::runs]
    local = None
    if drafter != "none":
        local = LocalDrafterConfig(trace=TRACE, session_s=fit.watch.ask_seconds / max(1, fit.watch.asks))
    found = []
    for seed in range(REPLAYS):
        deployment = Deployment(
            seed=seed * len(trace.sessions),
            target=_target(price, engine.model_copy(update={"kv_slots": concurrency})),
            local_drafter=local,
            workload=WorkloadConfig(
                requests=runs * len(requests),
                sessions=concurrency,
                prompt_tokens=tuple(len(answer["prompt_token_ids"]) for answer in requests),
                output_tokens=tuple(len(answer["token_ids"]) for answer in requests),
            ),
        )
        found.append(figures(replay(deployment, {TRACE: trace})))
    return {name: sum(one[name] for one in found) / len(found) for name in ("tokens_per_s", "tokens_per_round")}


def table(found: dict[str, Any]) -> str:
    """The comparison for people."""
    lines = ["drafter  at once   measured  predicted  error   at one level   tokens a round (predicted)"]
    for row in found["rows"]:
        lines.append(
            f"{row['drafter']:9}{row['concurrency']:7}{row['measured_tokens_per_s']:11.1f}"
            f"{row['predicted_tokens_per_s']:11.1f}{row['error']:+7.1%}{row['error_at_one_level']:+13.1%}"
            f"{row['measured_tokens_per_round']:10.2f} ({row['predicted_tokens_per_round']:.2f})"
        )
    return "\n".join(lines)


def _number(answer: Mapping[str, Any]) -> int:
    """A request's place among its half's prompts."""
    return int(answer["id"].split("-")[0])


def _target(price: StepPrice, engine: EngineConfig) -> TargetConfig:
    return TargetConfig(
        curve=CurveConfig(**asdict(price.curve)),
        engine=engine,
        factor=price.factor,
        position_s=price.position,
        prompt_row=price.prompt_row,
        choosing_s=(price.choosing, price.choosing_session),
        rest_s=(price.rest, price.rest_session, price.rest_row),
        noise=price.noise,
    )

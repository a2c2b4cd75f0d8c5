"""What a drafter offered at every position of recorded outputs, and which of it the target then said.

Since the target's tokens do not depend on guesses, a drafter's tree at each position and the nodes along the real
output are all that a replay needs, whatever is pruned and however many tokens a round gains. A trace holds no text: in
a replay the token at output position e is e itself, and guesses that were wrong carry ids from ``WRONG`` on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.core.errors import ConfigError
from cluster.core.token_tree import TokenTree

WRONG = 2**30
SCORE_STEPS = 16  # of a factor of two: how finely scores are kept
VOCAB_SIZE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Offer:
    """One tree of n nodes: (n,) parents, scores and stages as in ``TokenTree``; (n,) whether the output went there."""

    parents: npt.NDArray[np.int16]
    scores: npt.NDArray[np.float32]
    stages: npt.NDArray[np.uint8]
    hits: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, tree: TokenTree, path: Sequence[int]) -> Offer:
        hits = np.zeros(len(tree), np.bool_)
        hits[list(path)] = True
        return cls(tree.parents.astype(np.int16), tree.scores, tree.stages, hits)

    def tree(self, position: int, max_nodes: int, max_depth: int) -> TokenTree:
        """The tree as it hangs on the output token before ``position``; its best nodes, as many as wanted."""
        tokens = np.arange(WRONG, WRONG + len(self.parents), dtype=np.int32)
        tokens[self.hits] = np.arange(position, position + int(self.hits.sum()))
        whole = TokenTree.build(tokens, self.parents, self.scores, self.stages)
        return whole.prune(max_nodes, max_depth)


@dataclass(frozen=True, slots=True)
class SessionTrace:
    """One recorded session. ``offers[e]`` was made behind the e-th output token; there is none before the first."""

    prompt_tokens: int
    offers: Sequence[Offer]

    @property
    def output_tokens(self) -> int:
        return len(self.offers)

    def offer(self, position: int) -> Offer:
        """Where the replay goes on longer than the record, the record begins anew."""
        if position >= self.output_tokens > 1:
            position = 1 + (position - 1) % (self.output_tokens - 1)
        return self.offers[min(position, self.output_tokens - 1)]


@dataclass(frozen=True, slots=True)
class Trace:
    """Sessions of one drafter, and where they come from."""

    sessions: tuple[SessionTrace, ...]
    source: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        offers = [offer for session in self.sessions for offer in session.offers]
        columns: dict[str, Any] = {
            "prompt_tokens": np.array([session.prompt_tokens for session in self.sessions], np.int32),
            "output_tokens": np.array([session.output_tokens for session in self.sessions], np.int32),
            "sizes": np.array([len(offer.parents) for offer in offers], np.int16),
            "back": np.concatenate([np.arange(len(offer.parents)) - offer.parents for offer in offers]).astype(
                np.uint16
            ),
            "scores": _packed(np.concatenate([offer.scores for offer in offers])),
            "stages": np.concatenate([offer.stages for offer in offers]),
            "hits": np.concatenate([offer.hits for offer in offers]),
            "source": np.array(json.dumps(self.source)),
        }
        with path.open("wb") as file:  # a name would be given another suffix
            np.savez_compressed(file, **columns)


def load_trace(path: Path) -> Trace:
    """Raises ``ConfigError`` where ``path`` holds no trace."""
    try:
        with np.load(path, allow_pickle=False) as data:
            table = {name: data[name] for name in data.files}
        ends = np.cumsum(table["sizes"])[:-1]
        table["scores"] = 2.0 ** -(table["scores"] / SCORE_STEPS)
        kinds = (("back", np.int16), ("scores", np.float32), ("stages", np.uint8), ("hits", np.bool_))
        columns = [np.split(table[name].astype(kind), ends) for name, kind in kinds]
        offers = [Offer(np.arange(len(back), dtype=np.int16) - back, *rest) for back, *rest in zip(*columns)]
        lasts = np.cumsum(table["output_tokens"]).tolist()
        prompts, outputs = table["prompt_tokens"].tolist(), table["output_tokens"].tolist()
        sessions = tuple(
            SessionTrace(prompt, offers[last - count : last]) for prompt, count, last in zip(prompts, outputs, lasts)
        )
        return Trace(sessions, json.loads(str(table["source"])))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"trace: {path} holds no acceptance trace ({error})") from None


def _packed(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """A byte each, on a scale of logarithms: order along a path is kept."""
    steps = -SCORE_STEPS * np.log2(np.maximum(scores, np.finfo(np.float32).tiny))
    return np.clip(np.round(steps), 0, 255).astype(np.uint8)


def synthetic(
    rates: Sequence[float],
    depth: int,
    *,
    holds: float = 1.0,
    sessions: int = 32,
    prompt_tokens: int = 256,
    output_tokens: int = 128,
    stage: int = 2,
    seed: int = 0,
) -> Trace:
    """A drafter whose k-th guess at a place is right with chance ``rates[k]``; it guesses on below its first ones.

    holds: the share of these chances that is true; 1 for a drafter whose scores are calibrated, 0 for one that is
    always wrong.
    """
    random = np.random.default_rng(seed)
    width = len(rates)
    parents = np.array([width * (level - 1) if level else -1 for level in range(depth) for _ in range(width)], np.int16)
    path = rates[0] ** np.repeat(np.arange(depth), width)
    scores = (path * np.tile(rates, depth)).astype(np.float32)
    stages = np.full(len(parents), stage, np.uint8)
    none = Offer(parents[:0], scores[:0], stages[:0], np.zeros(0, np.bool_))

    def offer() -> Offer:
        hits = np.zeros(len(parents), np.bool_)
        for level in range(depth):
            right = int(np.searchsorted(np.cumsum(rates) * holds, random.random(), "right"))
            if right < width:
                hits[level * width + right] = True
            if right != 0:
                break
        return Offer(parents, scores, stages, hits)

    made = tuple(
        SessionTrace(prompt_tokens, [none, *(offer() for _ in range(output_tokens - 1))]) for _ in range(sessions)
    )
    facts = {"synthetic": {"rates": list(rates), "depth": depth, "holds": holds, "seed": seed}}
    return Trace(made, facts)

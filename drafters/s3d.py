"""S3D: the target without its middle layers guesses several tokens in one pass, through mask tokens (arXiv 2405.20314).

A draft pass runs the rows [root, M_1 ... M_{gamma-1}] through the first and the last layers, on the target's own keys
and values; row i's distribution is of the token i + 1 places behind the root. One pass a round, whatever gamma is.
Masks do not see what the rows before them guess, so a path's probability is the product of its positions' and the tree
is the best paths of a product. Nodes of a stage before it have rows of their own in the same pass: what it guesses
behind them is a guess behind these very tokens. Cost: the kept share of a target pass; memory: the masks and adapters
(``DraftView``). Its head knows a part of the vocabulary, and guesses mind neither biases nor penalties. It is the
target in disguise, so it runs on the target's rank alone, between verify steps: its scratch is overwritten by the next.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.core.errors import ConfigError
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin
from cluster.engine.draft_view import DraftView
from cluster.engine.kv_cache import SlotRows
from cluster.engine.rank import Rank
from drafters.base import Ask
from drafters.expand import Float64Array, Int64Array, Place, expand
from drafters.follower import Followed, Follower
from drafters.growth import ROOT, Growth
from drafters.options import GrowthOptions, S3DOptions
from drafters.s3d_adapter import S3DAdapter


@dataclass(frozen=True, slots=True)
class _Draft:
    """One session's part of a pass: rows for the root, the masks and ``nodes`` of the stage before, in this order."""

    session_id: str
    rows: SlotRows
    places: list[Place]
    nodes: list[int]
    growth: Growth


class S3DDrafter(Follower):
    """Drafts for many sessions with one pass over the target's rank.

    slot_of: session id -> the target's slot, None where it has none. max_len: positions the target can take.
    Raises ``ConfigError`` for a rank of several, for a gamma beyond what the adapter was trained for, and for more rows
    than the engine has.
    """

    def __init__(
        self,
        rank: Rank,
        adapter: S3DAdapter,
        options: S3DOptions,
        *,
        max_len: int,
        slot_of: Callable[[str], int | None],
        stage: Origin = Origin.MEDIUM,
    ) -> None:
        super().__init__()
        shape = adapter.header.shape
        self._gamma = options.gamma or shape.gamma
        if self._gamma > shape.gamma:
            raise ConfigError(
                f"gamma: {self._gamma} is not supported; allowed: up to {shape.gamma}, what the adapter was trained for"
            )
        if self._gamma + options.upstream_rows > rank.kv.scratch:
            raise ConfigError(
                f"gamma, upstream_rows: a pass takes {self._gamma + options.upstream_rows} rows of a slot, the engine's"
                f" max_rows gives {rank.kv.scratch}"
            )
        self.stage = stage
        self.vocab_size: int | None = rank.config.vocab_size
        self.view = DraftView(rank, shape.skip, adapter.low_rank, adapter.tensors["masks"], shape.head_size)
        self._rank, self._options, self._max_len, self._slot_of = rank, options, max_len, slot_of
        self._columns = np.arange(shape.head_size)
        self._growing = GrowthOptions(children=options.children, max_upstream=options.max_upstream, keep_scores=True)

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        """Sessions whose slot does not hold all but the last of their tokens are left out."""
        planned = [self._plan(ask, self._session(ask.session_id), upstream.get(ask.session_id)) for ask in asks]
        drafts = [draft for draft in planned if draft is not None]
        if not drafts:
            return {}
        logits = self.view.forward([draft.rows for draft in drafts])
        places = [place for draft in drafts for place in draft.places]
        tokens, probs = expand(logits.numpy(force=True), places, self._options.error_scale, self._columns)
        trees: dict[str, TokenTree] = {}
        end = 0
        for draft in drafts:
            start, end = end, end + len(draft.places)
            fill(draft.growth, draft.nodes, tokens[start:end], probs[start:end])
            trees[draft.session_id] = draft.growth.tree()
        return trees

    def _plan(self, ask: Ask, session: Followed, hint: TokenTree | None) -> _Draft | None:
        base = len(session.tokens)
        slot = self._slot_of(ask.session_id)
        if slot is None:
            return None
        if not 0 < base <= self._max_len or self._rank.kv.length(slot) != base - 1:
            return None
        # Row i stands at position base - 1 + i, and so does a node of depth i.
        max_depth = min(ask.max_depth, self._max_len - base + 1)
        depth = min(self._gamma, max_depth)
        growth = Growth(ask.max_nodes, max_depth, hint or TokenTree.empty(), self._growing, self.stage, ask.min_score)
        nodes = likeliest(growth, self._options.upstream_rows)
        row_of = {ROOT: 0, **{node: row for row, node in enumerate(nodes, depth)}}
        masks = range(self._rank.config.vocab_size, self._rank.config.vocab_size + depth - 1)
        tokens = [session.tokens[-1], *masks, *(growth.tokens[node] for node in nodes)]
        parents = [*range(-1, depth - 1), *(row_of[growth.parent(node)] for node in nodes)]
        places = [Place(session.params, base + row, session.history) for row in range(depth)]
        for path in map(growth.path, nodes):
            places.append(Place(session.params, base + len(path), session.history, path))
        rows = SlotRows(slot, np.array(tokens, np.int32), np.array(parents, np.int32))
        return _Draft(ask.session_id, rows, places, nodes, growth)


def likeliest(growth: Growth, count: int) -> list[int]:
    """At most ``count`` of the nodes taken over from upstream, each with its parent, parents first."""
    chosen = {ROOT}
    for node in sorted(growth.next_nodes(), key=growth.score, reverse=True):
        if len(chosen) <= count and growth.parent(node) in chosen:  # a lying stage's scores may rise along a path
            chosen.add(node)
    return sorted(chosen - {ROOT})


def fill(growth: Growth, nodes: Sequence[int], tokens: Int64Array, probs: Float64Array) -> None:
    """Give a tree the guesses of one pass: behind the root, behind ``nodes``, and through the masks behind all others.

    tokens, probs: (depths + nodes, k), each row falling by probability; row i of the first is of the token at depth
    i + 1, whatever the path to it. Example: depths' rows [0.6, 0.4] and [0.9, 0.1], no nodes: scores 0.6 and 0.4 at
    the root, then 0.54 and 0.06 below the first and, if there is room, 0.36 and 0.04 below the second.
    """
    depth = len(tokens) - len(nodes)
    growth.expand(ROOT, tokens[0], probs[0])
    for row, node in enumerate(nodes, depth):
        growth.expand(node, tokens[row], probs[row])
    known, seen = set(nodes), 0
    heap: list[tuple[float, int]] = []
    for _ in range(growth.max_nodes):  # whoever is not among the best so many has no place in the tree
        for node in range(seen, len(growth.tokens)):
            if growth.depths[node] < depth and node not in known:
                heapq.heappush(heap, (-growth.score(node), node))
        seen = len(growth.tokens)
        if not heap:
            return
        node = heapq.heappop(heap)[1]
        growth.expand(node, tokens[growth.depths[node]], probs[growth.depths[node]])

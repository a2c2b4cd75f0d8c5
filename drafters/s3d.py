"""S3D: the target without its middle layers guesses several tokens in one pass, through mask tokens (arXiv 2405.20314).

A draft pass runs the rows [root, M_1 ... M_{gamma-1}] through the first and the last layers, on the target's own keys
and values; row i's distribution is of the token i + 1 places behind the root. One pass a round, whatever gamma is.
Masks do not see what the rows before them guess, so a path's probability is the product of its positions' and the tree
is the best paths of a product. Cost: the kept share of a target pass; memory: the masks and adapters (``DraftView``).
It is the target in disguise, so it runs on the target's rank alone, between verify steps: its scratch is overwritten
by the next one. Trees of a stage before it are not looked at.
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
from drafters.options import S3DOptions
from drafters.s3d_adapter import S3DAdapter


@dataclass(frozen=True, slots=True)
class _Draft:
    """One session's part of a pass: ``depth`` rows, and what is asked of them."""

    ask: Ask
    session: Followed
    rows: SlotRows
    depth: int


class S3DDrafter(Follower):
    """Drafts for many sessions with one pass over the target's rank.

    slot_of: session id -> the target's slot, KeyError where it has none. max_len: positions the target can take.
    Raises ``ConfigError`` for a rank of several, and for a gamma beyond what the adapter was trained for.
    """

    def __init__(
        self,
        rank: Rank,
        adapter: S3DAdapter,
        options: S3DOptions,
        *,
        max_len: int,
        slot_of: Callable[[str], int],
        stage: Origin = Origin.MEDIUM,
    ) -> None:
        super().__init__()
        shape = adapter.header.shape
        self._gamma = options.gamma or shape.gamma
        if self._gamma > min(shape.gamma, rank.kv.scratch):
            raise ConfigError(
                f"gamma: {self._gamma} is not supported; allowed: up to {shape.gamma}, what the adapter was trained"
                f" for, and {rank.kv.scratch}, the engine's max_rows"
            )
        self.stage = stage
        self.vocab_size: int | None = rank.config.vocab_size
        self.view = DraftView(rank, shape.skip, adapter.low_rank, adapter.tensors["masks"], shape.head_size)
        self._rank, self._options, self._max_len, self._slot_of = rank, options, max_len, slot_of

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        """Sessions whose slot does not hold all but the last of their tokens are left out."""
        drafts = [draft for ask in asks if (draft := self._plan(ask, self._session(ask.session_id))) is not None]
        if not drafts:
            return {}
        logits = self.view.forward([draft.rows for draft in drafts])
        places = [
            Place(draft.session.params, len(draft.session.tokens) + row, draft.session.history)
            for draft in drafts
            for row in range(draft.depth)
        ]
        tokens, probs = expand(logits.numpy(), places, self._options.error_scale)
        trees: dict[str, TokenTree] = {}
        end = 0
        for draft in drafts:
            start, end = end, end + draft.depth
            children, ask = slice(self._options.children), draft.ask
            trees[ask.session_id] = product_tree(
                tokens[start:end, children], probs[start:end, children], ask.max_nodes, self.stage
            )
        return trees

    def _plan(self, ask: Ask, session: Followed) -> _Draft | None:
        base = len(session.tokens)
        try:
            slot = self._slot_of(ask.session_id)
        except KeyError:
            return None
        if not 0 < base <= self._max_len or self._rank.kv.length(slot) != base - 1:
            return None
        # Row i stands at position base - 1 + i.
        depth = min(self._gamma, ask.max_depth, self._max_len - base + 1)
        masks = self._rank.config.vocab_size + np.arange(depth - 1, dtype=np.int32)
        rows = np.concatenate([np.array(session.tokens[-1:], np.int32), masks], dtype=np.int32)
        return _Draft(ask, session, SlotRows(slot, rows, np.arange(-1, depth - 1, dtype=np.int32)), depth)


def product_tree(tokens: Int64Array, probs: Float64Array, max_nodes: int, stage: Origin) -> TokenTree:
    """The ``max_nodes`` likeliest nodes where every depth has its own distribution, whatever the path to it.

    tokens, probs: (depths, k), each row falling by probability. Tokens of probability 0 are left out. Example: rows
    [0.6, 0.4] and [0.9, 0.1] with 3 nodes give scores 0.6, 0.54 (below the first) and 0.4.
    """
    heap: list[tuple[float, int, int, int, int]] = []
    order = 0

    def push(parent: int, above: float, depth: int, place: int) -> None:
        """Offer the ``place``-th token of a depth as child of ``parent``; ties go to who was offered first."""
        nonlocal order
        if depth < len(tokens) and place < tokens.shape[1] and probs[depth, place] > 0.0:
            heapq.heappush(heap, (-above * float(probs[depth, place]), order, parent, depth, place))
            order += 1

    chosen: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    push(-1, 1.0, 0, 0)
    while heap and len(chosen) < max_nodes:
        score, _, parent, depth, place = heapq.heappop(heap)
        chosen.append(int(tokens[depth, place]))
        parents.append(parent)
        scores.append(-score)
        push(parent, scores[parent] if parent >= 0 else 1.0, depth, place + 1)
        push(len(chosen) - 1, -score, depth + 1, 0)
    return TokenTree.build(chosen, parents, scores, int(stage))

"""SSSD: guesses by looking up what followed the newest tokens earlier in the same session (arXiv 2411.05894).

Idea: prompt and output repeat themselves. A trie of the session's own windows gives, for each suffix of the text, how
often each continuation came; the tree is filled best-first with the likeliest continuations. Cost: no model, well
under a millisecond on one core, so it is the stage that is always there.

Scores are empirical path probabilities. Few occurrences make them over-confident, hence the discount: 0.6 once, and
0.6 + 0.1 m per level for a match of m tokens (the source's constants; never above 1, so that scores cannot grow).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from cluster.core.errors import Overloaded, UnknownSession
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin, SamplingParams
from drafters.base import Ask
from drafters.ngram_index import NgramIndex
from drafters.options import SssdOptions

_SOURCE_DISCOUNT = 0.6
_MAX_CHILDREN = 5
_BRANCH_DEPTHS = ((8, 5), (32, 6), (48, 8))


def branch_depth(length: int) -> int:
    """How deep a tree of ``length`` rows (root included) may go: the source's table."""
    if length <= 5:
        return length - 1
    return next((depth for limit, depth in _BRANCH_DEPTHS if length <= limit), 10)


def grow_tree(index: NgramIndex, query: int, max_nodes: int, max_depth: int, stage: Origin) -> TokenTree:
    """The best-first tree of ``index``'s continuations, matched by suffixes of ``query`` .. 1 tokens.

    A path found through several suffixes exists once: the likeliest find creates it, all of them extend it.
    """
    depth_limit = min(max_depth, branch_depth(max_nodes + 1))
    width = min(_MAX_CHILDREN, max_nodes)
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    places: dict[tuple[int, int], int] = {}
    num_children = [0] * (max_nodes + 1)  # by node; the root counts at -1, the list's last place
    heap: list[tuple[float, int, int, int, int, int, float]] = []
    order = 0

    def push(trie_node: int, parent: int, depth: int, score: float, decay: float) -> None:
        nonlocal order
        followers = index.children(trie_node)
        if len(followers) > width:
            # Of one source, only its `width` likeliest can find room under a node.
            followers = heapq.nlargest(width, followers, key=lambda follower: index.count(follower[1]))
        total = index.continuations(trie_node)
        for token, child in followers:
            order += 1
            share = score * index.count(child) / total
            heapq.heappush(heap, (-share, -depth, order, token, child, parent, decay))

    for length, trie_node in index.suffixes(query):
        push(trie_node, -1, 1, _SOURCE_DISCOUNT, min(1.0, 0.6 + 0.1 * length))
    while heap and len(tokens) < max_nodes:
        negative_score, negative_depth, _, token, trie_node, parent, decay = heapq.heappop(heap)
        node = places.get((parent, token))
        if node is None:
            if num_children[parent] == width:
                continue
            num_children[parent] += 1
            node = places[parent, token] = len(tokens)
            tokens.append(token)
            parents.append(parent)
            scores.append(-negative_score)
        depth = -negative_depth
        if depth < depth_limit:
            push(trie_node, node, depth + 1, -negative_score * decay, decay)
    return TokenTree.build(tokens, parents, scores, int(stage))


class SssdDrafter:
    """One ``NgramIndex`` per session. Raises ``Overloaded`` beyond ``max_sessions``."""

    vocab_size: int | None = None

    def __init__(self, options: SssdOptions, *, max_sessions: int = 16, stage: Origin = Origin.SMALL) -> None:
        self.stage = stage
        self._options = options
        self._max_sessions = max_sessions
        self._indexes: dict[str, NgramIndex] = {}

    def begin(self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int) -> None:
        if session_id not in self._indexes and len(self._indexes) >= self._max_sessions:
            raise Overloaded(f"{self._max_sessions} sessions are held already")
        index = NgramIndex(self._options.window, self._options.max_tokens)
        index.extend(token_ids)
        self._indexes[session_id] = index

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        indexes = [self._index(ask.session_id) for ask in asks]
        query = self._options.query
        trees = {
            ask.session_id: grow_tree(index, query, ask.max_nodes, ask.max_depth, self.stage)
            for ask, index in zip(asks, indexes)
        }
        return {session_id: tree for session_id, tree in trees.items() if len(tree)}

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        self._index(session_id).extend(token_ids)

    def end(self, session_id: str) -> None:
        self._indexes.pop(session_id, None)

    def _index(self, session_id: str) -> NgramIndex:
        index = self._indexes.get(session_id)
        if index is None:
            raise UnknownSession(f"session {session_id!r} was not begun")
        return index

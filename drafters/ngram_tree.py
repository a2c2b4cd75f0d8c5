"""The best-first tree over a session's own text and text stores: one estimate of the next token, one frontier.

What follows a run of tokens is estimated from the runs of ``query`` .. 1 newest tokens, the longest first. A run seen
``n`` times speaks for ``n / (n + prior)`` of what is left to say; the rest is left to the next shorter run, and in the
end to the store's commonest tokens. So few occurrences count for little without any table of discounts, and the
estimate is a probability. Occurrences in the session's own text weigh ``own_weight`` each, those in stores 1, but no
run in a store counts for more than ``store_cap``: a session's own habits must be heard over millions of tokens.

The estimate is made anew behind every node, so that a path can go on where the text it started from ends. This module
is the readable form; ``sssd.cpp`` does the same arithmetic in the same order.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.core.token_tree import TokenTree
from drafters.datastore import Datastore, Range
from drafters.ngram_index import ROOT, NgramIndex

Candidate = tuple[float, int, int, int]
"""(-score, parent node, token, depth): the smallest is the best."""


@dataclass(frozen=True, slots=True)
class Rules:
    """``query``: the longest run looked up, in tokens, at most 8; ``samples``: suffixes looked at per run, at most 256.

    ``negligible``: shorter runs are not looked at where all they could give a node is a lower score than this.
    ``chain``: only the likeliest follower of each node, for verifiers that take no trees.
    The numbers are the best of a replay over recorded outputs (``benchmarks/accepted_length.py``).
    """

    query: int = 4
    samples: int = 32
    own_weight: float = 12.0
    store_cap: float = 16.0
    prior: float = 20.0
    negligible: float = 1e-3
    chain: bool = False


class SessionIndex(Protocol):
    """One session's own text, and trees of what may follow it."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append ``token_ids`` to the text."""
        ...

    def grow(
        self, tail: Sequence[int], stores: Sequence[Datastore], max_nodes: int, max_depth: int, stage: int
    ) -> TokenTree:
        """The best ``max_nodes`` nodes behind the text, whose newest tokens (``query`` or all) are ``tail``."""
        ...


@dataclass(frozen=True, slots=True)
class _State:
    """What matches the newest 1, 2, ... ``query`` tokens: trie nodes, and for each store the ranks."""

    own: tuple[int | None, ...]
    stores: tuple[tuple[Range, ...], ...]


class PlainIndex:
    """``SessionIndex`` without a compiler."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._index = NgramIndex(rules.query)

    def extend(self, token_ids: Sequence[int]) -> None:
        self._index.extend(token_ids)

    def grow(
        self, tail: Sequence[int], stores: Sequence[Datastore], max_nodes: int, max_depth: int, stage: int
    ) -> TokenTree:
        query = self._rules.query
        root = _State((None,) * query, (((0, 0),) * query,) * len(stores))
        for token in tail[-query:]:
            root = self._step(root, stores, token)
        states = [root]  # the root's, then each node's
        nodes: list[Candidate] = []
        frontier: list[Candidate] = []

        def offer(parent: int, depth: int, score: float) -> None:
            room = max_nodes - len(nodes)
            found = self._followers(states[parent + 1], stores, score)
            if found and self._rules.chain:
                found = [min(found, key=lambda each: (-each[1], each[0]))]
            for token, share in found:
                candidate = (-min(score, score * share), parent, token, depth)
                if len(frontier) < room or candidate < frontier[-1]:
                    insort(frontier, candidate)
                    del frontier[room:]

        offer(-1, 1, 1.0)
        while frontier:
            best = frontier.pop(0)
            nodes.append(best)
            negative_score, parent, token, depth = best
            room = max_nodes - len(nodes)
            if depth < max_depth and (len(frontier) < room or (room and negative_score < frontier[-1][0])):
                states.append(self._step(states[parent + 1], stores, token))
                offer(len(nodes) - 1, depth + 1, -negative_score)
            else:
                states.append(root)  # holds the place; nothing hangs on this node
        return TokenTree.build(
            [token for _, _, token, _ in nodes],
            [parent for _, parent, _, _ in nodes],
            [-negative_score for negative_score, _, _, _ in nodes],
            stage,
        )

    def _step(self, state: _State, stores: Sequence[Datastore], token: int) -> _State:
        """What matches once ``token`` stands behind: every match of ``state`` goes on, and a new one begins."""
        before = (ROOT, *state.own[:-1])
        own = tuple(None if node is None else self._index.child(node, token) for node in before)
        ranges = (
            tuple(store.narrow(found, length, token) for length, found in enumerate(((0, len(store)), *matches[:-1])))
            for store, matches in zip(stores, state.stores)
        )
        return _State(own, tuple(ranges))

    def _followers(self, state: _State, stores: Sequence[Datastore], score: float) -> list[tuple[int, float]]:
        """(token, probability) of what may follow; the node itself has ``score``."""
        rules, index = self._rules, self._index
        found: dict[int, float] = {}
        weight = 1.0
        for length in range(rules.query, 0, -1):
            if weight * score < rules.negligible:
                break
            node = state.own[length - 1]
            total = rules.own_weight * (0 if node is None else index.followed(node))
            sizes = [matches[length - 1][1] - matches[length - 1][0] for matches in state.stores]
            for size in sizes:
                total += min(size, rules.store_cap)
            if total == 0.0:
                continue
            each = weight / (total + rules.prior)
            for token, count in [] if node is None else index.followers(node):
                found[token] = found.get(token, 0.0) + each * rules.own_weight * count
            for store, matches, size in zip(stores, state.stores, sizes):
                taken = max(1, min(size, rules.samples))
                share = each * (min(size, rules.store_cap) / taken)
                for token, count in store.followers(matches[length - 1], length, rules.samples):
                    found[token] = found.get(token, 0.0) + share * count
            weight = each * rules.prior
        if stores and weight * score >= rules.negligible:
            for token, common in zip(stores[0].common.tolist(), stores[0].shares.tolist()):
                found[token] = found.get(token, 0.0) + weight * common
        return list(found.items())

"""The best-first tree over a session's own text and text stores: one estimate of the next token, one frontier.

What follows a run of tokens is estimated from the runs of ``query`` .. 1 newest tokens, the longest first. A run seen
``n`` times speaks for ``n / (n + prior)`` of what is left to say; the rest is left to the next shorter run, and in the
end to the store's commonest tokens. So few occurrences count for little without any table of discounts, and the
estimate is a probability. Occurrences in the session's own text weigh ``own_weight`` each, those in stores 1, but no
run in a store counts for more than ``store_cap``: a session's own habits must be heard over millions of tokens.

The estimate is made anew behind every node, so that a path can go on where the text it started from ends.

A tree of outcomes is for a verifier of chains, and for the step after: the target verifies the best path meanwhile, and
what it says will be that path's beginning and one token more. So nodes of that path have all their followers, looked
for in more samples, and others the likeliest alone, but that without fail.

This module is the readable form; ``sssd.cpp`` and the headers beside it do the same arithmetic in the same order.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.core.token_tree import TokenTree
from drafters.datastore import Datastore, Range
from drafters.ngram_index import ROOT, NgramIndex

Candidate = tuple[float, int, int, int, float]
"""(-rank, parent node, token, depth, score): the smallest is the best. The rank is the score but for an outcome's first
follower."""


@dataclass(frozen=True, slots=True)
class Rules:
    """``query``: the longest run looked up, in tokens, at most 8; ``samples``: suffixes looked at per run, at most 256.

    ``negligible``: shorter runs are not looked at where all they could give a node is a lower score than this.
    ``chain``: only the likeliest follower of each node, for verifiers that take no trees. In a tree of outcomes,
    ``outcome_samples`` are looked at per run behind its best path; beside it, shorter runs only while they have at
    least the part ``beside`` of what is left to say.
    The numbers are the best of replays over recorded outputs (``benchmarks/accepted_length.py``; of outcomes:
    docs/log.md).
    """

    query: int = 4
    samples: int = 32
    own_weight: float = 12.0
    store_cap: float = 16.0
    prior: float = 20.0
    negligible: float = 1e-3
    chain: bool = False
    outcome_samples: int = 256
    beside: float = 0.2


class SessionIndex(Protocol):
    """One session's own text, and trees of what may follow it."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append ``token_ids`` to the text."""
        ...

    def grow(
        self,
        stores: Sequence[Datastore],
        max_nodes: int,
        max_depth: int,
        stage: int,
        outcomes: bool = False,
        min_score: float = 0.0,
    ) -> TokenTree:
        """The best ``max_nodes`` nodes behind the text, of those that score ``min_score`` at least.

        ``outcomes``: for what may come of a step that verifies the best path.
        """
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
        self._newest = deque[int](maxlen=rules.query)

    def extend(self, token_ids: Sequence[int]) -> None:
        self._index.extend(token_ids)
        self._newest.extend(token_ids)

    def grow(
        self,
        stores: Sequence[Datastore],
        max_nodes: int,
        max_depth: int,
        stage: int,
        outcomes: bool = False,
        min_score: float = 0.0,
    ) -> TokenTree:
        query, rules = self._rules.query, self._rules
        root = _State((None,) * query, (((0, 0),) * query,) * len(stores))
        for token in self._newest:
            root = self._step(root, stores, token)
        states = [root]  # the root's, then each node's
        nodes: list[Candidate] = []
        frontier: list[Candidate] = []
        end = -1  # of the best path
        on_path = [True]  # whether it is on that path: the root, then each node

        def offer(parent: int, depth: int, rank: float | None, score: float, beside: bool) -> None:
            room = max_nodes - len(nodes)
            floor = rules.beside if beside else max(rules.negligible, min_score) / score
            samples = rules.outcome_samples if outcomes and not beside else rules.samples
            found = self._followers(states[parent + 1], stores, floor, samples)
            if found and (rules.chain or beside):
                found = [min(found, key=lambda each: (-each[1], each[0]))]
            for token, probability in found:
                share = min(score, score * probability)
                candidate = (-(share if rank is None else rank), parent, token, depth, share)
                if share >= min_score and (len(frontier) < room or candidate < frontier[-1]):
                    insort(frontier, candidate)
                    del frontier[room:]

        offer(-1, 1, None, 1.0, False)
        while frontier:
            best = frontier.pop(0)
            negative_rank, parent, token, depth, score = best
            beside = outcomes and parent != end
            outcome = beside and on_path[parent + 1]
            if not beside:
                end = len(nodes)
            nodes.append(best)
            on_path.append(not beside)
            room = max_nodes - len(nodes)
            if depth < max_depth and (len(frontier) < room or (room and negative_rank < frontier[-1][0])):
                states.append(self._step(states[parent + 1], stores, token))
                # An outcome is worth its row only with something below it: its first follower ranks as it does.
                offer(len(nodes) - 1, depth + 1, -negative_rank if outcome else None, score, beside)
            else:
                states.append(root)  # holds the place; nothing hangs on this node
        _, parents, tokens, _, scores = zip(*nodes) if nodes else ((),) * 5
        return TokenTree.build(tokens, parents, scores, stage)

    def _step(self, state: _State, stores: Sequence[Datastore], token: int) -> _State:
        """What matches once ``token`` stands behind: every match of ``state`` goes on, and a new one begins."""
        before = (ROOT, *state.own[:-1])
        own = tuple(None if node is None else self._index.child(node, token) for node in before)
        ranges = (
            tuple(store.narrow(found, length, token) for length, found in enumerate(((0, len(store)), *matches[:-1])))
            for store, matches in zip(stores, state.stores)
        )
        return _State(own, tuple(ranges))

    def _followers(
        self, state: _State, stores: Sequence[Datastore], floor: float, samples: int
    ) -> list[tuple[int, float]]:
        """(token, probability) of what may follow. Runs that can give less than ``floor`` are left out."""
        rules, index = self._rules, self._index
        found: dict[int, float] = {}
        weight = 1.0
        for length in range(rules.query, 0, -1):
            if weight < floor:
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
                taken = max(1, min(size, samples))
                share = each * (min(size, rules.store_cap) / taken)
                for token, count in store.followers(matches[length - 1], length, samples):
                    found[token] = found.get(token, 0.0) + share * count
            weight = each * rules.prior
        if stores and weight >= floor:
            for token, common in zip(stores[0].common.tolist(), stores[0].shares.tolist()):
                found[token] = found.get(token, 0.0) + weight * common
        return list(found.items())

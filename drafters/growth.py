"""Growing token trees with a model's forward passes: one tree's state (``Growth``) and the batched passes (``grow``).

A node is *evaluated* once the model has run on it: then its children are known. Each pass evaluates the best-scored
nodes of every tree in one forward. Staged speculation's point is in the first pass: the stage before has guessed whole
paths, and all of its nodes are evaluated at once, so that where the model agrees the likeliest path advances several
levels in a single pass. Passes end when the likeliest path is as deep as it may get or too unlikely to pay; other
branches are extended on the rows of passes that path needs anyway, never by passes of their own.

Rows of a slot's scratch: first the *lead* (committed tokens the cache lacks, the root last), then evaluated nodes in
the order of their passes. This file knows neither sessions nor who owns the cache (``draft_model.py``, ``swift.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin, SamplingParams
from cluster.core.warp import History
from cluster.engine.kv_cache import SlotRows
from cluster.engine.rank import Rank
from drafters.expand import Float64Array, Int64Array, Place, expand
from drafters.options import GrowthOptions

ROOT = -1


class Growth:
    """One tree while it grows. Nodes are numbered in order of creation, so a parent stands before its children.

    Nodes of ``upstream`` are taken over unscored: a node's score is its parent's times the model's estimate, known when
    the parent is evaluated. Those the model gives no chance keep score 0 and are left out of the result. With
    ``keep_scores`` they have upstream's score where that is higher: of a model that knows less than upstream at times.
    """

    def __init__(
        self,
        max_nodes: int,
        max_depth: int,
        upstream: TokenTree,
        options: GrowthOptions,
        stage: Origin,
        min_score: float = 0.0,
    ) -> None:
        """``min_score``: as of an ask; it holds where the options' own is lower."""
        self.max_nodes = max_nodes
        self._max_depth = max_depth
        self._options = options
        self._min_score = max(min_score, options.min_score)
        self._stage = stage
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self._parents: list[int] = []
        self._scores: list[float] = []
        self._stages: list[int] = []
        self._children: dict[int, list[int]] = {ROOT: []}
        self._index: dict[tuple[int, int], int] = {}
        self.rows: dict[int, int] = {}
        """Scratch row of each evaluated node, the root included."""
        self._hints = self._adopt(upstream.prune(options.max_upstream, max_depth))

    def parent(self, node: int) -> int:
        return self._parents[node]

    def score(self, node: int) -> float:
        return self._scores[node]

    def path(self, node: int) -> tuple[int, ...]:
        """Tokens from the root's child down to ``node``; empty for the root."""
        tokens: list[int] = []
        while node != ROOT:
            tokens.append(self.tokens[node])
            node = self._parents[node]
        return tuple(reversed(tokens))

    def next_nodes(self) -> list[int]:
        """Nodes to evaluate in the next pass, parents before children; empty where no further pass pays."""
        hints, self._hints = self._hints, []
        return sorted({*hints, *self._picks()})

    def expand(self, node: int, tokens: Int64Array, probs: Float64Array) -> None:
        """Give an evaluated node its children: the likeliest of ``tokens``, and scores for those upstream guessed.

        tokens, probs: (k,) falling by probability. Call it for parents before their children.
        """
        own = 1.0 if node == ROOT else self._scores[node]
        adopted = {self.tokens[child]: child for child in self._children[node]}
        for rank, (token, prob) in enumerate(zip(tokens.tolist(), probs.tolist())):
            if prob == 0.0 or (rank >= self._options.children and not adopted):
                break
            child = adopted.pop(token, None)
            if child is not None:
                self._scores[child] = max(self._scores[child], own * prob)
            elif rank < self._options.children:
                self._add(token, node, own * prob, self._stage)

    def follow(self, token_ids: Sequence[int]) -> list[int]:
        """Scratch rows of the evaluated nodes along ``token_ids``, from the root's child on."""
        rows: list[int] = []
        node = ROOT
        for token in token_ids:
            child = self._index.get((node, token), ROOT)
            if child == ROOT or child not in self.rows:
                break
            rows.append(self.rows[child])
            node = child
        return rows

    def tree(self) -> TokenTree:
        """The best-scored nodes within the budget, closed under parents."""
        chosen = np.flatnonzero(np.asarray(self._scores, np.float32) > 0.0)
        whole = TokenTree.build(self.tokens, self._parents, self._scores, self._stages)
        return whole.take(chosen).prune(self.max_nodes, self._max_depth)

    def _adopt(self, upstream: TokenTree) -> list[int]:
        """Take over upstream's nodes, siblings of the same token once; returns those worth evaluating."""
        moved: list[int] = []
        scores = upstream.scores if self._options.keep_scores else np.zeros(len(upstream))
        columns = (upstream.tokens, upstream.parents, scores, upstream.stages)
        for token, parent, score, stage in zip(*(column.tolist() for column in columns)):
            place = moved[parent] if parent >= 0 else ROOT
            known = self._index.get((place, token))
            moved.append(self._add(token, place, score, stage) if known is None else known)
        return [node for node in range(len(self.tokens)) if self.depths[node] < self._max_depth]

    def _add(self, token: int, parent: int, score: float, stage: int) -> int:
        node = len(self.tokens)
        self.tokens.append(token)
        self.depths.append(1 if parent == ROOT else self.depths[parent] + 1)
        self._parents.append(parent)
        self._scores.append(score)
        self._stages.append(int(stage))
        self._children[parent].append(node)
        self._children[node] = []
        self._index[parent, token] = node
        return node

    def _picks(self) -> list[int]:
        """The likeliest path's tip, and the best other nodes that share its pass."""
        tip, last = self._tip(), self._last_place()

        def pays(node: int) -> bool:
            score = self._scores[node]
            return score >= self._min_score and score > last and self.depths[node] < self._max_depth

        if tip == ROOT or not pays(tip):
            return []
        others = [node for node in range(len(self._scores)) if node != tip and node not in self.rows and pays(node)]
        others.sort(key=lambda node: -self._scores[node])
        return [tip, *others[: self._options.expand_per_pass - 1]]

    def _tip(self) -> int:
        """The first node without evaluation on the likeliest path; ROOT where the path ends or has not begun."""
        node = ROOT
        while node in self.rows:
            node = max(self._children[node], key=self._scores.__getitem__, default=ROOT)
            if node == ROOT:
                break
        return node

    def _last_place(self) -> float:
        """The score a node must exceed for its children to have a chance in the result."""
        if len(self._scores) < self.max_nodes:
            return 0.0
        return sorted(self._scores, reverse=True)[self.max_nodes - 1]


@dataclass(slots=True)
class Plot:
    """One session's place in the batch. ``lead``: committed tokens the slot lacks; ``base``: committed length."""

    session_id: str
    slot: int
    lead: list[int]
    base: int
    params: SamplingParams
    history: History
    growth: Growth
    num_rows: int = field(default=0)


def grow(
    rank: Rank, plots: Sequence[Plot], options: GrowthOptions, lead_skip: frozenset[int], skip: frozenset[int]
) -> None:
    """Run at most ``options.passes`` forward passes, each over all ``plots`` that still want one.

    ``lead_skip`` and ``skip`` are the sub-layers left out for the lead and for guesses. Where they differ, the lead
    takes a pass of its own before the others.
    """
    if lead_skip != skip:
        _evaluate(rank, [(plot, []) for plot in plots], options, lead_skip)
    for _ in range(options.passes):
        work = [(plot, plot.growth.next_nodes()) for plot in plots]
        work = [(plot, nodes) for plot, nodes in work if nodes or not plot.num_rows]
        if not work:
            return
        _evaluate(rank, work, options, skip)


def _evaluate(rank: Rank, work: Sequence[tuple[Plot, list[int]]], options: GrowthOptions, skip: frozenset[int]) -> None:
    """One forward over each plot's ``nodes`` (and its lead, if that has not run), then their children."""
    evaluated: list[tuple[Growth, int]] = []
    places: list[Place] = []
    batch: list[SlotRows] = []
    for plot, nodes in work:
        first = not plot.num_rows
        batch.append(_rows(plot, nodes))
        for node in [ROOT, *nodes] if first else nodes:
            evaluated.append((plot.growth, node))
            path = plot.growth.path(node)
            places.append(Place(plot.params, plot.base + len(path), plot.history, path))
    logits = rank.forward(batch, skip=skip)
    tokens, probs = expand(logits.numpy(), places, options.error_scale)
    for row, (growth, node) in enumerate(evaluated):
        growth.expand(node, tokens[row], probs[row])


def _rows(plot: Plot, nodes: Sequence[int]) -> SlotRows:
    """The rows of one plot in one pass, and their places in the scratch noted down.

    Example: lead [7, 8] and nodes 0 (on the root) and 1 (on node 0) give tokens [7, 8, t0, t1], parents [-1, 0, 1, 2]
    and logits for all rows but the first.
    """
    growth, start = plot.growth, plot.num_rows
    tokens: list[int] = [] if start else list(plot.lead)
    parents = list(range(-1, len(tokens) - 1))
    wants = [False] * (len(tokens) - 1) + [True] if tokens else []
    if not start:
        growth.rows[ROOT] = len(tokens) - 1
    for node in nodes:
        growth.rows[node] = start + len(tokens)
        tokens.append(growth.tokens[node])
        parents.append(growth.rows[growth.parent(node)])
        wants.append(True)
    plot.num_rows = start + len(tokens)
    return SlotRows(
        plot.slot,
        np.asarray(tokens, np.int32),
        np.asarray(parents, np.int32),
        scratch_start=start,
        logits=np.asarray(wants, np.bool_),
    )

"""``TokenTree``: guesses that hang on a session's last emitted token, as flat arrays.

The root is the last emitted token. It is not a node; nodes that hang on it have parent -1. A parent stands before its
children, so one forward sweep visits every node after its parent. ``n`` nodes make ``n + 1`` rows of a step.

The tree used in the docstrings below and in the tests::

        root
       /    \\
      0      1          tokens  = [5, 7, 6, 8, 9]
     / \\      \\         parents = [-1, -1, 0, 0, 1]
    2   3      4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.core.errors import InvalidTree
from cluster.core.types import TreeKey

Int32Array = npt.NDArray[np.int32]
MAX_NODES = 1024
_PLACES = np.arange(MAX_NODES, dtype=np.int32)


def _int32(values: Any) -> Int32Array:
    return np.ascontiguousarray(values, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Flat parallel arrays of length n (n may be 0).

    tokens:  (n,) int32, the guessed token ids.
    parents: (n,) int32, index of the parent node, -1 for the root; ``parents[i] < i``.
    scores:  (n,) float32, estimated probability that the target's output follows the path down to the node;
             never larger than the parent's.
    stages:  (n,) uint8, the ``Origin`` that proposed the node first.
    key:     the session state the root stands for; None until the host of a drafter stamps it.
    """

    tokens: Int32Array
    parents: Int32Array
    scores: npt.NDArray[np.float32]
    stages: npt.NDArray[np.uint8]
    key: TreeKey | None = field(default=None)

    @classmethod
    def build(
        cls,
        tokens: Sequence[int] | npt.NDArray[Any],
        parents: Sequence[int] | npt.NDArray[Any],
        scores: Sequence[float] | npt.NDArray[Any] | None = None,
        stages: Sequence[int] | npt.NDArray[Any] | int = 0,
        key: TreeKey | None = None,
    ) -> TokenTree:
        """Convert to the array types above; scores default to 1, a single stage value is repeated. Does not check."""
        n = len(tokens)
        return cls(
            _int32(tokens),
            _int32(parents),
            np.ones(n, np.float32) if scores is None else np.ascontiguousarray(scores, dtype=np.float32),
            np.full(n, stages, np.uint8) if isinstance(stages, int) else np.ascontiguousarray(stages, dtype=np.uint8),
            key,
        )

    @classmethod
    def empty(cls, key: TreeKey | None = None) -> TokenTree:
        return cls.build([], [], key=key)

    @classmethod
    def chain(cls, tokens: Sequence[int], stage: int = 0, key: TreeKey | None = None) -> TokenTree:
        return cls.build(tokens, np.arange(-1, len(tokens) - 1), stages=stage, key=key)

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def with_key(self, key: TreeKey) -> TokenTree:
        return TokenTree(self.tokens, self.parents, self.scores, self.stages, key)

    def check(self, vocab_size: int, max_nodes: int = MAX_NODES, max_depth: int | None = None) -> None:
        """Verify every invariant before the tree is used. Raises ``InvalidTree`` naming the first breach.

        Duplicate siblings are legal (they waste a row, the walk takes the first); a tree that came over the wire
        costs at most ``max_nodes`` rows, whatever is in it.
        """
        if getattr(self.tokens, "ndim", 0) != 1:
            raise InvalidTree("tokens is not a flat array")
        n = len(self)
        if n > max_nodes:
            raise InvalidTree(f"{n} nodes, at most {max_nodes}")
        for name, kind in (("tokens", np.int32), ("parents", np.int32), ("scores", np.float32), ("stages", np.uint8)):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != kind or array.shape != (n,):
                raise InvalidTree(f"{name} is not a ({n},) array of {np.dtype(kind).name}")
        if n == 0:
            return
        if self.tokens.view(np.uint32).max() >= vocab_size:  # as unsigned numbers negative ones are the largest
            raise InvalidTree(f"a token id is outside [0, {vocab_size})")
        if self.parents.min() < -1 or bool((self.parents >= _PLACES[:n]).any()):
            raise InvalidTree("a parent does not stand before its child")
        if not bool(np.isfinite(self.scores).all()):
            raise InvalidTree("a score is not finite")
        if self.stages.max() > 2:
            raise InvalidTree("a stage is not one of 0, 1, 2")
        if max_depth is not None and int(self.depths().max()) > max_depth:
            raise InvalidTree(f"deeper than {max_depth}")

    def depths(self) -> Int32Array:
        """(n,) int32: 1 for nodes that hang on the root. Example: [1, 1, 2, 2, 2]."""
        depths = np.ones(len(self), np.int32)
        for node, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                depths[node] = depths[parent] + 1
        return depths

    def ancestor_mask(self) -> npt.NDArray[np.bool_]:
        """(n, n) bool: row i marks the nodes on the path to i, itself included. Example row 3: [1, 0, 0, 1, 0]."""
        n = len(self)
        mask = np.zeros((n, n), np.bool_)
        for node, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                mask[node] = mask[parent]
            mask[node, node] = True
        return mask

    def child(self, node: int, token: int) -> int | None:
        """The first child of ``node`` (-1 for the root) that carries ``token``."""
        hits = np.flatnonzero((self.parents == node) & (self.tokens == token))
        return int(hits[0]) if hits.size else None

    def path(self, node: int) -> list[int]:
        """Nodes from depth 1 down to ``node``; empty for the root (-1)."""
        nodes: list[int] = []
        while node >= 0:
            nodes.append(node)
            node = int(self.parents[node])
        return nodes[::-1]

    def take(self, nodes: npt.NDArray[Any]) -> TokenTree:
        """The sub-tree of ``nodes`` (ascending), renumbered. One whose parent is not among them hangs on the root."""
        count = len(nodes)
        if count and nodes[-1] == count - 1:  # the first ones, as the best mostly are
            return TokenTree(
                self.tokens[:count], self.parents[:count], self.scores[:count], self.stages[:count], self.key
            )
        renumber = np.full(len(self) + 1, -1, np.int32)
        renumber[nodes] = np.arange(len(nodes), dtype=np.int32)
        return TokenTree(
            self.tokens[nodes], renumber[self.parents[nodes]], self.scores[nodes], self.stages[nodes], self.key
        )

    def after(self, tokens: Sequence[int]) -> TokenTree:
        """What hangs below the path that ``tokens`` walk from the root; empty where there is no such path. Key None.

        Scores become those of paths that begin there. Example: after [5] it is tokens [6, 8], parents [-1, -1].
        """
        node = -1
        for token in tokens:
            child = self.child(node, token)
            if child is None:
                return TokenTree.empty()
            node = child
        inside = {node}
        for index, parent in enumerate(self.parents[node + 1 :].tolist(), node + 1):
            if parent in inside:
                inside.add(index)
        tree = self.take(np.array(sorted(inside - {node}), np.int64))
        share = float(self.scores[node]) if node >= 0 else 1.0
        scores = np.minimum(tree.scores / share, 1.0).astype(np.float32) if share > 0.0 else np.zeros_like(tree.scores)
        return TokenTree(tree.tokens, tree.parents, scores, tree.stages)

    def prune(self, max_nodes: int, max_depth: int | None = None) -> TokenTree:
        """The ``max_nodes`` best-scored nodes no deeper than ``max_depth``, closed under parents.

        Scores never grow along a path and the sort is stable, so a parent always ranks before its children; scores
        that break this (a lying drafter) are clipped to the parent's first.
        """
        n = len(self)
        if n <= max_nodes and (max_depth is None or n <= max_depth or int(self.depths().max()) <= max_depth):
            return self
        scores = self.scores.copy()
        for node, parent in enumerate(self.parents.tolist()):
            if parent >= 0 and scores[node] > scores[parent]:
                scores[node] = scores[parent]
        order = np.argsort(-scores, kind="stable")
        if max_depth is not None:
            order = order[self.depths()[order] <= max_depth]
        return self.take(np.sort(order[:max_nodes]))

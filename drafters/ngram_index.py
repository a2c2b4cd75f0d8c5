"""``NgramIndex``: how often each run of up to ``query + 1`` tokens occurs in one session's text, as a trie.

Owns the counts; knows nothing of trees, budgets or scores (``sssd.py``). Appending a token costs ``query + 1``
dictionary steps. The newest tokens count at once: each of the last start positions keeps a cursor in the trie.
``trie.h`` has the same class for machines with a compiler.
"""

from __future__ import annotations

from collections.abc import Sequence

ROOT = 0


class NgramIndex:
    """Trie of the runs of one growing text. Nodes are integers; ``ROOT`` is the empty run. ``query`` is at least 1."""

    def __init__(self, query: int = 4) -> None:
        if query < 1:
            raise ValueError(f"query {query} must be at least 1")
        self._query = query
        self._cursors: list[int] = []  # the nodes of the text's last 1, 2, ... query + 1 tokens
        self._counts = [0]
        self._followed = [0]
        self._children: list[dict[int, int]] = [{}]

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append ``token_ids`` to the text."""
        for token in token_ids:
            parents = [ROOT, *self._cursors[: self._query]]
            self._cursors = [self._child_or_new(parent, token) for parent in parents]
            for parent, child in zip(parents, self._cursors):
                self._followed[parent] += 1
                self._counts[child] += 1

    def child(self, node: int, token: int) -> int | None:
        """The node of ``node``'s run with ``token`` behind it, None where that does not occur or is too long."""
        return self._children[node].get(token)

    def followed(self, node: int) -> int:
        """How often any token followed that run: its occurrences, less one at the very end of the text."""
        return self._followed[node]

    def followers(self, node: int) -> list[tuple[int, int]]:
        """(token, count) of every token that ever followed."""
        return [(token, self._counts[child]) for token, child in self._children[node].items()]

    def runs(self) -> dict[tuple[int, ...], int]:
        """Every run of 1 to ``query + 1`` tokens with its count: the whole content, independent of node numbers."""
        found: dict[tuple[int, ...], int] = {}
        stack: list[tuple[tuple[int, ...], int]] = [((), ROOT)]
        while stack:
            run, node = stack.pop()
            for token, child in self._children[node].items():
                found[(*run, token)] = self._counts[child]
                stack.append(((*run, token), child))
        return found

    def _child_or_new(self, node: int, token: int) -> int:
        child = self._children[node].get(token)
        if child is None:
            child = self._children[node][token] = len(self._counts)
            self._counts.append(0)
            self._followed.append(0)
            self._children.append({})
        return child

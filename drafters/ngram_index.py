"""``NgramIndex``: how often each run of up to ``window`` tokens occurs in one session's text, as a trie.

Owns the counts; knows nothing of trees, budgets or scores (``sssd.py``). Appending a token costs ``window`` dictionary
steps. The newest tokens count at once: each of the last ``window`` start positions keeps a cursor in the trie, and the
cursors are at the same time the matches of the text's own suffixes, so that a look-up needs no search.

Memory: every retained token is the start of one window, so there are at most ``window * max_tokens`` nodes. Most nodes
have a single child and hold it in two machine integers; a dictionary appears only where the text branches. Beyond
``max_tokens`` the oldest start position is taken out of the trie for each one that comes in.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from itertools import islice

ROOT = 0
_NONE = -1


class NgramIndex:
    """Trie of the windows of one growing text. Nodes are integers; ``ROOT`` is the empty run.

    ``window`` counts tokens, at least 2; ``max_tokens`` is at least ``window``.
    """

    def __init__(self, window: int = 8, max_tokens: int = 32_768) -> None:
        if window < 2 or max_tokens < window:
            raise ValueError(f"window {window} must be at least 2, max_tokens {max_tokens} at least the window")
        self._window = window
        self._max_tokens = max_tokens
        self._tokens: deque[int] = deque()
        self._cursors: list[int] = []  # the nodes of the text's last 1, 2, ... window tokens
        self._counts = array("q", [0])
        self._only_token = array("q", [_NONE])
        self._only_child = array("q", [_NONE])
        self._branches: dict[int, dict[int, int]] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        """How many tokens of the text are still counted."""
        return len(self._tokens)

    @property
    def num_nodes(self) -> int:
        """Nodes in use, the root included."""
        return len(self._counts) - len(self._free)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append ``token_ids`` to the text."""
        counts = self._counts
        for token in token_ids:
            self._tokens.append(token)
            counts[ROOT] += 1
            cursors = [ROOT, *self._cursors[: self._window - 1]]
            for i, node in enumerate(cursors):
                child = self._child_or_new(node, token)
                counts[child] += 1
                cursors[i] = child
            self._cursors = cursors
            if len(self._tokens) > self._max_tokens:
                self._forget_oldest()

    def suffixes(self, longest: int) -> list[tuple[int, int]]:
        """(length, node) of the text's last ``longest`` .. 1 tokens, longest first, where something ever followed."""
        matches = enumerate(self._cursors[:longest], start=1)
        return [(length, node) for length, node in matches if self.has_children(node)][::-1]

    def count(self, node: int) -> int:
        """How often the run ``node`` stands for occurs."""
        return self._counts[node]

    def continuations(self, node: int) -> int:
        """How often a token followed that run: its count, less the occurrence at the very end of the text."""
        return self._counts[node] - (node in self._cursors)

    def has_children(self, node: int) -> bool:
        return self._only_child[node] != _NONE or node in self._branches

    def children(self, node: int) -> list[tuple[int, int]]:
        """(token, child node) of every token that ever followed, in order of first occurrence."""
        if node in self._branches:
            return list(self._branches[node].items())
        only = self._only_child[node]
        return [] if only == _NONE else [(self._only_token[node], only)]

    def find(self, token_ids: Sequence[int]) -> int | None:
        """The node of the run ``token_ids``, None where it does not occur (or is longer than the window)."""
        node = ROOT
        for token in token_ids:
            child = self._child(node, token)
            if child == _NONE:
                return None
            node = child
        return node

    def runs(self) -> dict[tuple[int, ...], int]:
        """Every run of 1 to ``window`` tokens with its count: the whole content, independent of node numbers."""
        found: dict[tuple[int, ...], int] = {}
        stack: list[tuple[tuple[int, ...], int]] = [((), ROOT)]
        while stack:
            run, node = stack.pop()
            for token, child in self.children(node):
                found[(*run, token)] = self._counts[child]
                stack.append(((*run, token), child))
        return found

    def _child(self, node: int, token: int) -> int:
        if self._only_token[node] == token:
            return self._only_child[node]
        branches = self._branches.get(node)
        return _NONE if branches is None else branches.get(token, _NONE)

    def _child_or_new(self, node: int, token: int) -> int:
        child = self._child(node, token)
        if child != _NONE:
            return child
        child = self._new_node()
        branches = self._branches.get(node)
        if branches is not None:
            branches[token] = child
        elif self._only_child[node] == _NONE:
            self._only_token[node], self._only_child[node] = token, child
        else:
            self._branches[node] = {self._only_token[node]: self._only_child[node], token: child}
            self._only_token[node] = self._only_child[node] = _NONE
        return child

    def _new_node(self) -> int:
        if self._free:
            return self._free.pop()
        self._counts.append(0)
        self._only_token.append(_NONE)
        self._only_child.append(_NONE)
        return len(self._counts) - 1

    def _forget_oldest(self) -> None:
        """Take the oldest window out: one count off every node on its path, and the nodes that fall to zero."""
        oldest = list(islice(self._tokens, self._window))
        self._tokens.popleft()
        self._counts[ROOT] -= 1
        node = ROOT
        for token in oldest:
            child = self._child(node, token)
            self._counts[child] -= 1
            if self._counts[child] == 0:
                self._unlink(node, token)
                self._free.append(child)
            node = child

    def _unlink(self, node: int, token: int) -> None:
        branches = self._branches.get(node)
        if branches is None:
            self._only_token[node] = self._only_child[node] = _NONE
            return
        del branches[token]
        if not branches:
            del self._branches[node]

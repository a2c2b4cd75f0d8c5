"""A drafter in the engine's own process and thread, for engines that are followed by their rows' texts."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.token_tree import TokenTree
from cluster.rounds.guard import GuardedDrafter
from cluster.rounds.rows import RowText
from drafters.base import Ask, Drafter


class LocalDrafter:
    """``tree_nodes``: asked for by row. ``wanted``: rows that were asked for, ``missing``: those without a tree.

    A row whose drafter failed, or did not take it, gets none.
    """

    def __init__(self, stage: str, drafter: Drafter, vocab_size: int, tree_nodes: int) -> None:
        self.stages = (stage,)
        self._tree_nodes = tree_nodes
        self.wanted = self.missing = 0
        self._drafter = GuardedDrafter(drafter, vocab_size)
        self._lengths: dict[str, int] = {}  # of each row's text, as far as the drafter has it

    def open(self, text: RowText) -> None:
        self._drafter.begin(text.id, text.tokens, text.params, text.prompt_len, text.owner)
        self._lengths[text.id] = text.base

    def trees(self, texts: Sequence[RowText]) -> dict[str, TokenTree]:
        """By row, on its present text."""
        for text in texts:
            if text.base > self._lengths[text.id]:
                self._drafter.commit(text.id, text.tokens[self._lengths[text.id] :])
                self._lengths[text.id] = text.base
        trees = self._drafter.propose([Ask(text.id, self._tree_nodes, text.max_depth) for text in texts], {})
        self.wanted += len(texts)
        self.missing += len(texts) - len(trees)
        return trees

    def close(self, text_id: str) -> None:
        self._lengths.pop(text_id, None)  # it may have ended before it was begun
        self._drafter.end(text_id)

"""A drafter that is always sure and always wrong: what guessing may cost at most.

It is as bad as a drafter can be while keeping to the interface: random tokens, scored as certain, in a tree as large as
it is allowed. The governor has to find out.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin, SamplingParams
from drafters.base import Ask


class AlwaysWrong:
    """Chains of random token ids below ``vocab_size``, hung on the root and on each other."""

    stage = Origin.SMALL

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size: int | None = vocab_size
        self._random = random.Random(0)

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        """Nothing about the session matters."""

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        return {ask.session_id: self._tree(ask) for ask in asks}

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        """Nothing is learnt."""

    def end(self, session_id: str) -> None:
        """Nothing is held."""

    def _tree(self, ask: Ask) -> TokenTree:
        assert self.vocab_size is not None
        tokens = [self._random.randrange(self.vocab_size) for _ in range(ask.max_nodes)]
        parents = [-1 if node % ask.max_depth == 0 else node - 1 for node in range(ask.max_nodes)]
        return TokenTree.build(tokens, parents, [1.0] * ask.max_nodes, int(self.stage))

"""Staged speculation: a small drafter's tree is the medium drafter's upstream (after arXiv 2308.04623).

Idea: the medium model checks the small one's guesses as the target checks the medium's, many nodes in one pass, so that
where they agree the medium needs fewer passes. Cost: the small stage's time, on top of fewer medium passes. Here both
stages run in one process; across processes the host of the medium stage receives small's trees and calls the same
``propose(asks, upstream)`` and ``fill_in``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from drafters.base import Ask, Drafter, Learner

log = logging.getLogger(__name__)
_ANY_TOKEN = 2**31 - 1


def fill_in(
    asks: Sequence[Ask], upstream: Mapping[str, TokenTree], trees: Mapping[str, TokenTree]
) -> dict[str, TokenTree]:
    """The later stage's tree of each session; upstream's, cut to the budget, where that stage had no guess."""
    answer = dict(trees)
    for ask in asks:
        hint = upstream.get(ask.session_id)
        if hint is not None and ask.session_id not in answer:
            answer[ask.session_id] = hint.prune(ask.max_nodes, ask.max_depth)
    return answer


class StagedDrafter:
    """``small`` feeds ``medium``. Errors of medium are the caller's; a failing small costs its hints, nothing else.

    small_nodes: small guesses at least so many nodes, whatever is asked, since all of them ride on one medium pass.
    """

    def __init__(self, small: Drafter, medium: Drafter, *, small_nodes: int = 16) -> None:
        self.stage = medium.stage
        self.vocab_size = medium.vocab_size
        self._small = small
        self._medium = medium
        self._small_nodes = small_nodes
        self._small_holds: set[str] = set()

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        self._medium.begin(session_id, token_ids, params, prompt_len, owner)
        try:
            self._small.begin(session_id, token_ids, params, prompt_len, owner)
        except Exception:
            self._drop_small(session_id)
        else:
            self._small_holds.add(session_id)

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        hints = {**upstream, **self._guess_small(asks, upstream)}
        return fill_in(asks, hints, self._medium.propose(asks, hints))

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        self._medium.commit(session_id, token_ids)
        if session_id in self._small_holds:
            try:
                self._small.commit(session_id, token_ids)
            except Exception:
                self._drop_small(session_id)

    def end(self, session_id: str) -> None:
        self._medium.end(session_id)
        self._small_holds.discard(session_id)
        self._small.end(session_id)

    def study(self) -> bool:
        """Medium's, where it learns."""
        return isinstance(self._medium, Learner) and self._medium.study()

    def _drop_small(self, session_id: str) -> None:
        """Go on without the small stage, which has just raised, until the session is begun again."""
        log.exception("the small stage fails for session %s: medium drafts without its hints", session_id)
        self._small_holds.discard(session_id)

    def _guess_small(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        """Small's trees that keep a tree's invariants."""
        known = [
            replace(ask, max_nodes=max(ask.max_nodes, self._small_nodes), min_score=0.0)
            for ask in asks
            if ask.session_id in self._small_holds
        ]
        try:
            trees = self._small.propose(known, upstream) if known else {}
            for tree in trees.values():
                tree.check(self.vocab_size or _ANY_TOKEN)
        except Exception:
            log.exception("the small stage fails: medium drafts without its hints")
            return {}
        return dict(trees)

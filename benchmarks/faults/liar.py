"""A draft worker that lies: run as a Ray worker's set-up hook, while the file named by ``PACELINE_LIES`` exists its
answers are rubbish of five kinds in turn. What a buggy or hostile drafter could send; it is a real worker otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from itertools import count
from pathlib import Path

import numpy as np

from cluster.core.token_tree import MAX_NODES, TokenTree
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.messages import DraftAsk, DraftReply

SWITCH = "PACELINE_LIES"


def install() -> None:
    """Named in the environment of a worker (see ``service.py``). Ray calls it before the worker's actor is made."""
    honest = DraftWorker.draft
    switch, calls = Path(os.environ[SWITCH]), count()

    @wraps(honest)
    def draft(
        self: DraftWorker, verifier: str, asks: Sequence[DraftAsk], upstream: DraftReply | None = None
    ) -> DraftReply:
        reply = honest(self, verifier, asks, upstream)
        return lie(reply, next(calls)) if switch.exists() else reply

    DraftWorker.draft = draft  # type: ignore[method-assign]


def lie(reply: DraftReply, number: int) -> DraftReply:
    """The reply with every tree spoilt in the ``number``-th way, and a length it cannot hold in the last of them."""
    spoil = LIES[number % len(LIES)]
    trees = {session: spoil(tree) for session, tree in reply.trees.items()}
    if spoil is _unspoilt:
        own = replace(reply.reports[-1], held={session: 10**6 for session in reply.reports[-1].held})
        return replace(reply, trees=trees, reports=(*reply.reports[:-1], own))
    return replace(reply, trees=trees)


def _wrong_tokens(tree: TokenTree) -> TokenTree:
    return replace(tree, tokens=(tree.tokens + 1) % 7)


def _outside_vocabulary(tree: TokenTree) -> TokenTree:
    return replace(tree, tokens=tree.tokens + 10**6)


def _circular(tree: TokenTree) -> TokenTree:
    return replace(tree, parents=np.arange(len(tree.parents), dtype=tree.parents.dtype))


def _oversized(tree: TokenTree) -> TokenTree:
    times = 4 * MAX_NODES
    return replace(
        tree,
        tokens=np.resize(tree.tokens, times),
        parents=np.arange(-1, times - 1, dtype=tree.parents.dtype),
        scores=np.ones(times, dtype=tree.scores.dtype),
        stages=np.resize(tree.stages, times),
    )


def _unspoilt(tree: TokenTree) -> TokenTree:
    return tree


LIES: tuple[Callable[[TokenTree], TokenTree], ...] = (
    _wrong_tokens,
    _outside_vocabulary,
    _circular,
    _oversized,
    _unspoilt,
)

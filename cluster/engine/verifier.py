"""One verify step: prefill chunks and token trees of many sessions in, accepted paths out.

The verifier is the only source of truth about what a session's next tokens are; drafters only decide how many of them
one step can confirm. Positions: a decoding session of length *base* has its root, the last emitted token, at position
base - 1, whose K/V is not computed yet; so a slot's committed length is base - 1 between steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.core import noise_native
from cluster.core.accept import Accepted, accept
from cluster.core.errors import EngineFailed
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from cluster.core.warp import History
from cluster.engine.kv_cache import SlotRows
from cluster.engine.rank import Rank, Tip


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompt tokens of one slot whose K/V is to be computed; no logits, no output."""

    slot: int
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Verify:
    """One session's tree, hung on ``root`` (its last token). ``position`` is base: where the first new token stands.

    ``lead``: the end of a prompt, before its root: the step that computes it yields the first token as well.
    """

    slot: int
    root: int
    tree: TokenTree
    params: SamplingParams
    history: History
    position: int
    stop_ids: frozenset[int]
    lead: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class VerifySpent:
    """Seconds of one step: the forward pass, and the walks with their KV commits."""

    forward: float
    accept: float


class Verifier:
    """Runs steps over a rank. Touches torch; owned by the engine thread.

    ``pause_s`` is added to every forward pass, and ``row_pause_s`` for each root and node: experiments emulate a larger
    target by them.
    """

    def __init__(self, rank: Rank, pause_s: float = 0.0, row_pause_s: float = 0.0) -> None:
        self.rank = rank
        self._pause_s = pause_s
        self._row_pause_s = row_pause_s
        noise_native.library()  # compiled now rather than within a round

    def step(
        self, prefills: Sequence[Prefill], verifies: Sequence[Verify]
    ) -> tuple[list[Accepted | EngineFailed], VerifySpent]:
        """One forward pass for everything; commits K/V of the prefilled tokens and of every accepted path.

        Returns one entry per verify, in order: the accepted block, or the error of a session whose row cannot be
        decided (NaN logits), which concerns that session alone.
        """
        start = time.perf_counter()
        batch = [_tree_rows(work) for work in verifies] + [_chain_rows(work) for work in prefills]
        features = self._features(verifies)
        rows = self.rank.forward(batch, features=features).numpy()
        if self._pause_s or self._row_pause_s:
            time.sleep(self._pause_s + self._row_pause_s * sum(len(work.tree) + 1 for work in verifies))
        forwarded = time.perf_counter()
        for chunk in prefills:
            self.rank.kv.commit(chunk.slot, range(len(chunk.token_ids)))
        results: list[Accepted | EngineFailed] = []
        at = 0
        for work in verifies:
            size = len(work.tree) + 1
            try:
                block = accept(rows[at : at + size], work.tree, work.params, work.history, work.position, work.stop_ids)
            except EngineFailed as error:
                results.append(error)
            else:
                first = len(work.lead)
                self.rank.kv.commit(work.slot, [*range(first + 1), *(first + 1 + node for node in block.nodes)])
                if self.rank.tips is not None and features is not None:
                    last = at + 1 + block.nodes[-1] if block.nodes else at
                    self.rank.tips[work.slot] = Tip(work.position + len(block.nodes) + 1, features[last])
                results.append(block)
            at += size
        return results, VerifySpent(forwarded - start, time.perf_counter() - forwarded)

    def _features(self, verifies: Sequence[Verify]) -> torch.Tensor | None:
        """Room for the hidden states of the rows that decide, where a drafter wants them."""
        if self.rank.tips is None or not verifies:
            return None
        wanted = sum(len(work.tree) + 1 for work in verifies)
        return torch.empty((wanted, self.rank.config.hidden_size), dtype=self.rank.decoder.kernels.dtype)


def _tree_rows(work: Verify) -> SlotRows:
    """First the lead's chain, then the root, then node i as the i-th row behind it. The lead wants no logits."""
    first = len(work.lead)
    tokens = np.concatenate((work.lead, [work.root], work.tree.tokens)).astype(np.int32)
    parents = np.concatenate((np.arange(-1, first), work.tree.parents + first + 1)).astype(np.int32)
    return SlotRows(work.slot, tokens, parents, logits=np.arange(len(tokens)) >= first if first else True)


def _chain_rows(work: Prefill) -> SlotRows:
    count = len(work.token_ids)
    return SlotRows(
        work.slot,
        np.asarray(work.token_ids, np.int32),
        np.arange(-1, count - 1, dtype=np.int32),
        logits=False,
    )

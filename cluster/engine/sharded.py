"""The forward pass of one tensor-parallel rank: its shard's part of every sub-layer, and the sums between them.

The residual is the same on all ranks, bit for bit: each adds up the same addends in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cluster.engine.collectives import RankGroup
from cluster.engine.kernels import ShardStep, to_host
from cluster.engine.kv_store import KVStore
from cluster.engine.packed import PackedModel
from cluster.engine.rows import StepRows


class ShardedForward:
    """A ``Forward``: all ranks call it with the same rows and skips; rank 0 gets the logits."""

    def __init__(
        self,
        begin: Callable[[StepRows, KVStore], ShardStep],
        model: PackedModel,
        vocab_size: int,
        group: RankGroup,
    ) -> None:
        self._begin, self._group, self._vocab_size = begin, group, vocab_size
        self._num_sub_layers = 2 * len(model.layers)
        self._embedding = model.embedding

    def __call__(
        self, step: StepRows, kv: KVStore, skip: frozenset[int], features: torch.Tensor | None
    ) -> torch.Tensor:
        if features is not None:
            raise ValueError("ranks of a sharded target hand out no hidden states")
        part = self._begin(step, kv)
        hidden = self._group.sum(self._embed(step.tokens.to(self._embedding.device)))
        for index in range(self._num_sub_layers):
            if index not in skip:
                hidden = hidden + self._group.sum(part.addend(index, hidden)).to(hidden.dtype)
        logits = torch.empty((0, self._vocab_size))
        if step.wanted is None or len(step.wanted):
            logits = self._group.gather_columns(part.logits(hidden), self._vocab_size)
        self._group.settle()
        return to_host(logits)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n,) -> (n, hidden): the embeddings of this rank's share of the vocabulary, zeros for other tokens."""
        share = self._group.shard.share(self._vocab_size)
        elsewhere = (tokens < share.start) | (tokens >= share.stop)
        rows = self._embedding[(tokens - share.start).masked_fill(elsewhere, 0)]
        return rows.masked_fill(elsewhere[:, None], 0.0)

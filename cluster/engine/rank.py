"""One rank of the target: its weights, its KV cache, and the forward pass over a batch of trees and prompt chunks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cluster.core.errors import ConfigError
from cluster.engine.decoder import Decoder
from cluster.engine.kernels import Kernels, choose_kernels
from cluster.engine.kv_cache import KVCache, SlotRows
from cluster.engine.model_config import DecoderConfig
from cluster.engine.rows import lay_out
from cluster.engine.weights import load_weights, read_config

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tip:
    """What the head saw where it decided a session's newest token: (hidden,), behind the final norm.

    length: tokens of the session, that one included.
    """

    length: int
    features: torch.Tensor


class Rank:
    """A decoder and a KV cache. Not thread-safe: one thread drives it."""

    def __init__(self, decoder: Decoder, kv: KVCache) -> None:
        if decoder.num_positions < kv.slot_size:
            raise ValueError(f"{kv.slot_size} positions per slot, but rotary tables for {decoder.num_positions}")
        self.decoder = decoder
        self.kv = kv
        self.tips: dict[int, Tip] | None = None
        """By slot, where a drafter wants them: kept by the verifier."""

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config

    @property
    def kernels(self) -> str:
        """Which kernels compute: ``triton``, ``native`` or ``torch``."""
        return self.decoder.kernels.name

    @functools.cached_property
    def row_invariant(self) -> bool:
        """Whether a row's logits are bit-equal whatever else is in the step, as a check on this machine found."""
        return is_row_invariant(self)

    def warn_if_not_row_invariant(self) -> None:
        if not self.row_invariant:
            dtype = self.decoder.kernels.dtype
            log.warning(
                "kernels: %s in %s are not row-invariant here: output may depend on batching", self.kernels, dtype
            )

    @torch.inference_mode()
    def forward(
        self,
        batch: Sequence[SlotRows],
        skip: frozenset[int] = frozenset(),
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute all rows in one step. Returns (rows wanting logits, in batch order, vocab) fp32.

        Keys and values become scratch of their slots, until ``kv.commit`` keeps a path or the next pass voids them.
        ``skip``: sub-layers left out, 2 * layer for attention, 2 * layer + 1 for the MLP. ``features``: see
        ``kernels.Forward``. Raises ``ValueError`` for rows that do not fit the cache or break the tree's order.
        """
        if not batch:
            return torch.empty((0, self.config.vocab_size))
        return self.decoder.forward(lay_out(batch, self.kv, self.config.vocab_size), self.kv, skip, features)

    @property
    def peer_pids(self) -> dict[str, int]:
        """Processes of the other tensor-parallel ranks, by name."""
        return {}

    def close(self) -> None:
        """Let go of what the rank holds beside memory: nothing, where it is the only one."""


def build_rank(
    folder: Path,
    dtype: str,
    *,
    num_slots: int,
    capacity: int,
    scratch: int,
    kernels: str = "auto",
    threads: int = 0,
) -> Rank:
    """Load a model folder and check that its kernels are row-invariant here.

    dtype: bfloat16, float32 or float64. threads: 0 takes torch's number. Raises ``ConfigError`` for a model or a choice
    that cannot be served.
    """
    config = read_config(folder)
    check_window(config, capacity)
    chosen = choose_kernels(kernels, dtype, threads)
    weights = load_weights(folder, config, chosen.dtype)
    return rank_of(config, weights, chosen, num_slots=num_slots, capacity=capacity, scratch=scratch)


def rank_of(
    config: DecoderConfig,
    weights: Mapping[str, torch.Tensor],
    kernels: Kernels,
    *,
    num_slots: int,
    capacity: int,
    scratch: int,
    head_tokens: torch.Tensor | None = None,
) -> Rank:
    """A rank of loaded weights; see ``Decoder`` for ``head_tokens``."""
    decoder = Decoder(config, weights, kernels, capacity + scratch, head_tokens=head_tokens)
    rank = Rank(decoder, KVCache(config, num_slots, capacity, scratch, kernels.dtype, kernels.device))
    rank.warn_if_not_row_invariant()
    return rank


def check_window(config: DecoderConfig, capacity: int) -> None:
    """Raises ``ConfigError`` where positions would fall out of the model's sight before ``capacity``."""
    if config.sliding_window is not None and config.sliding_window < capacity:
        raise ConfigError(
            f"sliding_window: {config.sliding_window} is not supported with max_model_len {capacity}; "
            f"allowed: max_model_len up to {config.sliding_window}"
        )


def is_row_invariant(rank: Rank) -> bool:
    """Run the first layer and the head on random tokens in several groupings, and compare bit for bit.

    Every matrix shape of the model is in one layer and the head, so this costs a fraction of a step. Uses one free KV
    slot and gives it back.
    """
    config, kv = rank.config, rank.kv
    skip = frozenset(range(2, 2 * config.num_layers))
    count = min(24, kv.capacity, kv.scratch)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, count, dtype=np.int32)
    chain = np.arange(-1, count - 1, dtype=np.int32)
    slot = kv.allocate()
    try:
        expected = rank.forward([SlotRows(slot, tokens, chain)], skip)
        for width in (1, 3):
            kv.truncate(slot, 0)
            parts = []
            for start in range(0, count, width):
                chunk = tokens[start : start + width]
                parts.append(rank.forward([SlotRows(slot, chunk, chain[: len(chunk)])], skip))
                kv.commit(slot, range(len(chunk)))
            if not torch.equal(torch.cat(parts), expected):
                return False
        return True
    finally:
        kv.free(slot)

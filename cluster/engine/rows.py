"""The rows of one step, packed: several slots, their trees and prompt chunks, with no padding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.engine.kv_cache import KVCache, SlotRows


@dataclass(frozen=True, slots=True)
class StepRows:
    """What the kernels need to know of a step's n rows.

    tokens:       (n,) int64.
    slots:        (n,) int32, KV slot.
    prefixes:     (n,) int32, committed positions of the slot, all visible to the row.
    positions:    (n,) int32, position id: prefix + number of ancestors in the scratch.
    cache_rows:   (n,) int64, where the row's key is written: slot * slot_size + prefix + scratch index.
    paths:        (n, w) int32, scratch indices of the row's ancestors, root first, then the row itself, then zeros.
    path_lengths: (n,) int32, how many of them count.
    wanted:       indices of the rows that want logits; None for all.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    prefixes: torch.Tensor
    positions: torch.Tensor
    cache_rows: torch.Tensor
    paths: torch.Tensor
    path_lengths: torch.Tensor
    wanted: torch.Tensor | None

    def __len__(self) -> int:
        return int(self.tokens.shape[0])


def lay_out(batch: Sequence[SlotRows], kv: KVCache, vocab_size: int) -> StepRows:
    """Pack a batch and record its rows as scratch. Raises ``ValueError`` for rows that cannot be computed."""
    if len({rows.slot for rows in batch}) != len(batch):
        raise ValueError("a slot may stand in a step only once")
    tokens = np.concatenate([rows.tokens for rows in batch], dtype=np.int64)
    if tokens.size and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
        raise ValueError(f"a token id is outside [0, {vocab_size})")
    paths = [path for rows in batch for path in kv.add_scratch(rows)]
    counts = [len(rows.tokens) for rows in batch]
    slots = np.repeat(np.array([rows.slot for rows in batch], np.int32), counts)
    prefixes = np.repeat(np.array([kv.length(rows.slot) for rows in batch], np.int32), counts)
    lengths = np.array([len(path) for path in paths], np.int32)
    table = np.zeros((len(paths), int(lengths.max(initial=1))), np.int32)
    for row, path in enumerate(paths):
        table[row, : len(path)] = path
    scratch = np.concatenate([np.arange(n) + rows.scratch_start for n, rows in zip(counts, batch)])
    everything = all(rows.logits is True for rows in batch)
    flags = [np.broadcast_to(np.asarray(rows.logits), n) for n, rows in zip(counts, batch)]
    return StepRows(
        tokens=torch.from_numpy(tokens),
        slots=torch.from_numpy(slots),
        prefixes=torch.from_numpy(prefixes),
        positions=torch.from_numpy(prefixes + lengths - 1),
        cache_rows=torch.from_numpy(slots.astype(np.int64) * kv.slot_size + prefixes + scratch),
        paths=torch.from_numpy(table),
        path_lengths=torch.from_numpy(lengths),
        wanted=None if everything else torch.from_numpy(np.flatnonzero(np.concatenate(flags))),
    )

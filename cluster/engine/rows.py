"""The rows of one step, packed: several slots, their trees and prompt chunks, with no padding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.engine.kv_cache import Int32Array, KVCache, SlotRows


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
    # Lists, and few calls of array libraries: for a handful of rows it is the calls that take the time.
    paths, slots, prefixes, cache_rows, flags = list[Int32Array](), list[int](), list[int](), list[int](), list[bool]()
    for rows in batch:
        count, prefix = len(rows.tokens), kv.length(rows.slot)
        first = rows.slot * kv.slot_size + prefix + rows.scratch_start
        paths += kv.add_scratch(rows)
        slots += [rows.slot] * count
        prefixes += [prefix] * count
        cache_rows += range(first, first + count)
        flags += [rows.logits] * count if isinstance(rows.logits, bool) else rows.logits.tolist()
    if len(flags) != len(paths):
        raise ValueError(f"{len(flags)} rows want logits or do not, of {len(paths)}")
    lengths = [len(path) for path in paths]
    positions = [prefix + length - 1 for prefix, length in zip(prefixes, lengths)]
    table = np.zeros((len(paths), max(lengths, default=0)), np.int32)
    for row, path in enumerate(paths):
        table[row, : len(path)] = path
    columns = torch.from_numpy(np.array((slots, prefixes, positions, lengths), np.int32)).unbind()
    return StepRows(
        tokens=torch.from_numpy(tokens),
        slots=columns[0],
        prefixes=columns[1],
        positions=columns[2],
        cache_rows=torch.from_numpy(np.array(cache_rows, np.int64)),
        paths=torch.from_numpy(table),
        path_lengths=columns[3],
        wanted=None if all(flags) else torch.from_numpy(np.flatnonzero(flags)),
    )

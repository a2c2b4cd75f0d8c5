"""What rank 0 tells the other ranks before a step: the rows, the sub-layers to skip, the K/V to move first.

An order travels as one array of integers: nothing that comes over the wire is ever executed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

from cluster.engine.kv_store import Move
from cluster.engine.rows import StepRows

Words = npt.NDArray[np.int64]

ALL_WANTED = -1
_INT64 = ("tokens", "cache_rows", "wanted")
_ARRAYS = tuple(field.name for field in fields(StepRows) if field.name not in ("paths", "wanted"))  # (n,) each


@dataclass(frozen=True, slots=True)
class Order:
    """One step: make ``moves`` in the cache, in order, then compute ``rows`` without the sub-layers in ``skip``."""

    rows: StepRows
    skip: frozenset[int]
    moves: Sequence[Move]


def encode(order: Order) -> Words:
    """Counts first, then the arrays one behind the other, then skip and moves."""
    rows = order.rows
    num_wanted = ALL_WANTED if rows.wanted is None else len(rows.wanted)
    parts: list[object] = [[len(rows), rows.paths.shape[1], num_wanted, len(order.skip), len(order.moves)]]
    parts += [getattr(rows, name).numpy() for name in _ARRAYS]
    parts.append(rows.paths.numpy().ravel())
    if rows.wanted is not None:
        parts.append(rows.wanted.numpy())
    parts.append(sorted(order.skip))
    for move in order.moves:
        parts += [(move.source, move.target, move.start, len(move.positions)), move.positions]
    return np.concatenate([np.asarray(part, np.int64) for part in parts])


def decode(words: Words) -> Order:
    """The order ``encode`` made these words of."""
    counts, rest = words[:5].tolist(), _Reader(words[5:])
    num_rows, width, num_wanted, num_skipped, num_moves = counts
    arrays = {name: _tensor(name, rest.take(num_rows)) for name in _ARRAYS}
    paths = _tensor("paths", rest.take(num_rows * width)).view(num_rows, width)
    wanted = None if num_wanted == ALL_WANTED else _tensor("wanted", rest.take(num_wanted))
    skip = frozenset(rest.take(num_skipped).tolist())
    return Order(StepRows(**arrays, paths=paths, wanted=wanted), skip, list(_moves(rest, num_moves)))


def _moves(rest: _Reader, count: int) -> Iterator[Move]:
    for _ in range(count):
        source, target, start, length = rest.take(4).tolist()
        yield Move(source, rest.take(length).tolist(), target, start)


def _tensor(name: str, words: Words) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.int64 if name in _INT64 else np.int32))


class _Reader:
    def __init__(self, words: Words) -> None:
        self._words, self._at = words, 0

    def take(self, count: int) -> Words:
        part = self._words[self._at : self._at + count]
        self._at += count
        return part

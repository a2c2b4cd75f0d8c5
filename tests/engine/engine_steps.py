"""Short spellings of steps for the engine's tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cluster.engine.kv_cache import SlotRows
from cluster.engine.rank import Rank

# The seven rows of the tests: a root (row 0) and six nodes.
#
#         0
#       /   \
#      1     2
#     / \     \
#    3   4     5
#    |
#    6
TREE_PARENTS = (-1, 0, 0, 1, 1, 2, 3)


def rows(slot: int, tokens: Sequence[int], parents: Sequence[int], start: int = 0, logits: object = True) -> SlotRows:
    return SlotRows(slot, np.array(tokens, np.int32), np.array(parents, np.int32), start, logits)  # type: ignore[arg-type]


def chain(slot: int, tokens: Sequence[int], logits: object = True) -> SlotRows:
    return rows(slot, tokens, range(-1, len(tokens) - 1), logits=logits)


def prefill(rank: Rank, tokens: Sequence[int], chunk: int = 1000) -> int:
    """A new slot with ``tokens`` committed."""
    slot = rank.kv.allocate()
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        rank.forward([chain(slot, part, logits=False)])
        rank.kv.commit(slot, range(len(part)))
    return slot


def path_to(row: int, parents: Sequence[int] = TREE_PARENTS) -> list[int]:
    """Rows from the root down to ``row``."""
    path: list[int] = []
    while row >= 0:
        path.append(row)
        row = parents[row]
    return path[::-1]


def random_tokens(count: int, vocab: int, seed: int = 0) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

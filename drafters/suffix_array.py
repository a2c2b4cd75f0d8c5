"""The suffix array of a text of token ids, by prefix doubling in numpy.

Suffixes are ordered by their first ``DEPTH`` tokens only: no look-up compares more, and a text that repeats itself at
length would otherwise cost as many rounds as its longest repetition has bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

DEPTH = 16


def suffix_array(text: npt.NDArray[Any], largest: int) -> npt.NDArray[np.int32]:
    """(n,) positions, ordered by the ``DEPTH`` ids from there on; an end of the text stands before any id.

    text: (n,) ids in [0, largest]. Takes about 60 bytes a token while it works. Raises ``ValueError`` from 2**31
    tokens on.
    """
    size = len(text)
    if size >= 1 << 31:
        raise ValueError(f"{size} tokens, at most {(1 << 31) - 1}")
    if size == 0:
        return np.zeros(0, np.int32)
    bits = int(largest + 1).bit_length()
    covered = 64 // bits
    keys = np.zeros(size, np.uint64)
    for ahead in range(covered):
        keys <<= np.uint64(bits)
        keys[: max(0, size - ahead)] |= text[ahead:].astype(np.uint64) + np.uint64(1)
    order = np.argsort(keys)
    while covered < DEPTH:
        ranks, num_ranks = _ranks(keys, order)
        if num_ranks == size:
            break
        keys = ranks * np.uint64(num_ranks + 1)
        keys[: max(0, size - covered)] += ranks[covered:] + np.uint64(1)
        order = np.argsort(keys)
        covered *= 2
    return order.astype(np.int32)


def _ranks(keys: npt.NDArray[np.uint64], order: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint64], int]:
    """The rank of each position among the distinct keys, and how many those are."""
    sorted_keys = keys[order]
    changes = np.concatenate([[False], sorted_keys[1:] != sorted_keys[:-1]])
    steps = np.cumsum(changes)
    ranks = np.empty(len(keys), np.uint64)
    ranks[order] = steps
    return ranks, int(steps[-1]) + 1

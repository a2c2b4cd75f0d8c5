"""Matchness: how many tokens of a committed text a layer-skipped target would have guessed, in one forward pass.

Each position of a window is computed as a draft's root would have been: over the full model's own keys and values of
everything before it, which are in the cache already, and its own. So one pass scores all of them at once, and what is
scored is what drafting gets. The rows' keys and values are written behind the slot's capacity, where no committed
position ever lies: a slot may be studied whether a session runs in it or has just left it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cluster.core.types import SamplingParams
from cluster.core.warp import History
from cluster.engine.kv_cache import KVCache
from cluster.engine.rank import Rank
from cluster.engine.rows import StepRows
from drafters.expand import Place, expand

Hits = npt.NDArray[np.bool_]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Window:
    """n positions of a slot, from ``first`` on, whose full-model K/V is in the cache.

    tokens: (n + 1,) int32, those at the positions and the one behind them: each is followed by the one to be guessed.
    params: of the session that generated them.
    """

    slot: int
    first: int
    tokens: Int32Array
    params: SamplingParams

    def __len__(self) -> int:
        return len(self.tokens) - 1


@torch.inference_mode()
def score(rank: Rank, windows: Sequence[Window], skip: frozenset[int]) -> Hits:
    """(all windows' positions,) bool: where the first guess of the model without ``skip`` is the token that followed.

    One pass over windows of different slots, each no longer than the cache's scratch. Not for a rank of several: it
    speaks to this rank's decoder. Raises ``ValueError`` for windows that do not fit.
    """
    logits = rank.decoder.forward(lay_out_windows(windows, rank.kv), rank.kv, skip).numpy()
    followed = np.concatenate([window.tokens[1:] for window in windows])
    if all(window.params.greedy for window in windows):
        return np.asarray(logits.argmax(axis=1) == followed)
    nothing = History((), (), SamplingParams())
    places = [Place(w.params, w.first + 1 + row, nothing) for w in windows for row in range(len(w))]
    return np.asarray(expand(logits, places)[0][:, 0] == followed)


def lay_out_windows(windows: Sequence[Window], kv: KVCache) -> StepRows:
    """The rows of ``windows``, each seeing the committed positions before it and itself.

    Example: a window of positions 8 and 9 in a slot of capacity 100 has prefix 8 and paths [92] and [0, 93]: indices
    into what lies behind the prefix, that is the cache's rows 100, and 8 and 101.
    """
    if len({window.slot for window in windows}) != len(windows):
        raise ValueError("a slot may be studied only once in a step")
    counts = [len(window) for window in windows]
    width, total = max(counts), sum(counts)
    if min(counts) < 1 or width > kv.scratch or any(w.first < 0 or w.first + len(w) > kv.capacity for w in windows):
        raise ValueError(f"windows of {counts} positions do not fit {kv.capacity} with {kv.scratch} rows of scratch")
    paths = np.zeros((total, width), np.int32)
    at = 0
    for window, count in zip(windows, counts):
        block = paths[at : at + count]
        block[:, :count] = np.tril(np.broadcast_to(np.arange(count, dtype=np.int32), (count, count)), -1)
        rows = np.arange(count)
        block[rows, rows] = kv.capacity - window.first + rows
        at += count
    within = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    slots = np.repeat(np.array([window.slot for window in windows], np.int32), counts)
    prefixes = np.repeat(np.array([window.first for window in windows], np.int32), counts)
    return StepRows(
        tokens=torch.from_numpy(np.concatenate([window.tokens[:-1] for window in windows]).astype(np.int64)),
        slots=torch.from_numpy(slots),
        prefixes=torch.from_numpy(prefixes),
        positions=torch.from_numpy(prefixes + within),
        cache_rows=torch.from_numpy(slots.astype(np.int64) * kv.slot_size + kv.capacity + within),
        paths=torch.from_numpy(paths),
        path_lengths=torch.from_numpy(within + 1),
        wanted=None,
    )

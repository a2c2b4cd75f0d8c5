"""Noise-coupled expansion: the children a draft model gives a node, and how likely the target takes each.

The target's token at position t is ``argmax(warp(logits) + G(seed, t))``, and the noise G is known to everyone. So a
drafter perturbs its own logits with the same noise: where it agrees with the target, it lands on the same token, at any
temperature. Children are the best of ``logits + T * G`` (the same order as ``logits / T + G``; at T = 0, plain logits).

How likely is a child? The target's logits are the draft's plus an error. Were that error Gumbel noise of scale s, in
units of logits, the target's argmax would be child i with probability ``softmax((logits + T * G) / s)[i]`` exactly.
That is the estimate used; s is ``error_scale``. 1 makes the greedy estimate the plain softmax of the draft's logits; a
draft closer to the target earns a smaller one. (SmolLM2 with 12 of 56 sub-layers skipped, 768 tokens each at T = 0, 0.8
and 1: the likelihood is best between 0.75 and 1; with 1 the first child's mean estimate is 0.48, 0.49, 0.50, and it
was the target's token in 0.55, 0.51, 0.48 of the cases.)

Only the top 64 logits of a row are looked at: below them lies next to no probability, and noise, top-p and sorting over
a whole vocabulary would cost more than the draft's forward pass. They are picked by numpy, row by row: where other
processes want the cores, torch's threaded topk takes a hundred times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.core.noise import keyed_noise_at
from cluster.core.types import SamplingParams
from cluster.core.warp import FloatRow, History, constrain, top

TOP = 64
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row's children stand, and how their session chooses.

    position: absolute position of the children; history: the session's committed tokens; path: the tree's tokens behind
    them, the row's own included.
    """

    params: SamplingParams
    position: int
    history: History
    path: tuple[int, ...] = ()


def expand(
    logits: npt.NDArray[np.float32],
    places: Sequence[Place],
    error_scale: float = 1.0,
    columns: Int64Array | None = None,
) -> tuple[Int64Array, Float64Array]:
    """Candidates for the children of each row's node, likeliest first.

    logits: (rows, vocab) float32, one row per evaluated node; places: one per row. columns: the ids, rising,
    that the columns stand for, of a head that knows a part of the vocabulary; no biases and no penalties then.
    Returns tokens (rows, k) int64 and probs (rows, k) float64, k = min(64, vocab): each row's probs fall and sum to 1;
    a token that the session's top-k, top-p or min-p rules out has 0. Ties go to the lower token id.
    """
    tokens, values = _top(logits, places, columns)
    temperatures = np.array([place.params.temperature for place in places])[:, None]
    values = np.where(_allowed(values, places, temperatures), values, -np.inf)
    for row, place in enumerate(places):
        if not place.params.greedy:
            noise = keyed_noise_at(place.params.seed, place.position, tokens[row])
            values[row] += place.params.temperature * noise
    probs = np.exp((values - values.max(axis=1, keepdims=True)) / error_scale)
    probs /= probs.sum(axis=1, keepdims=True)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(tokens, order, axis=1), np.take_along_axis(probs, order, axis=1)


def _top(
    logits: npt.NDArray[np.float32], places: Sequence[Place], columns: Int64Array | None
) -> tuple[Int64Array, Float64Array]:
    """The best ``TOP`` tokens of each row in id order, with their logits after biases and penalties.

    A row with fewer finite logits is filled up with token 0 at -inf.
    """
    width = min(TOP, logits.shape[1])
    tokens = np.zeros((len(places), width), np.int64)
    values = np.full((len(places), width), -np.inf)
    for row, place in enumerate(places):
        constrained = _constrain(logits[row], place) if columns is None else logits[row]
        best = np.sort(top(constrained, width))
        tokens[row, : len(best)] = best if columns is None else columns[best]
        values[row, : len(best)] = constrained[best]
    return tokens, values


def _constrain(row: FloatRow, place: Place) -> FloatRow:
    """The row after the session's biases and penalties, as the target would see it behind the place's path."""
    if not place.params.has_penalties:
        return constrain(row, place.params, place.history, frozenset())
    for token in place.path:
        place.history.push(token)
    try:
        return constrain(row, place.params, place.history, frozenset())
    finally:
        for _ in place.path:
            place.history.pop()


def _allowed(values: Float64Array, places: Sequence[Place], temperatures: Float64Array) -> npt.NDArray[np.bool_]:
    """(rows, k) bool: what min-p, top-k and top-p leave of each row, in the target's order of warps.

    Greedy rows are not cut: their best token passes every cut.
    """
    allowed = np.ones(values.shape, np.bool_)
    cut = [
        row
        for row, place in enumerate(places)
        if not place.params.greedy and (place.params.min_p > 0.0 or place.params.top_k > 0 or place.params.top_p < 1.0)
    ]
    if not cut:
        return allowed
    params = [places[row].params for row in cut]
    order = np.argsort(-values[cut], axis=1, kind="stable")
    falling = np.take_along_axis(values[cut], order, axis=1) / temperatures[cut]
    probs = np.exp(falling - falling[:, :1])
    keep = probs >= np.array([p.min_p for p in params])[:, None]
    ranks = np.arange(values.shape[1])[None, :]
    keep &= ranks < np.array([p.top_k if p.top_k > 0 else TOP for p in params])[:, None]
    probs = np.where(keep, probs, 0.0)
    probs /= probs.sum(axis=1, keepdims=True)
    before = np.cumsum(probs, axis=1) - probs
    keep &= before < np.array([p.top_p for p in params])[:, None]
    kept = np.empty_like(keep)
    np.put_along_axis(kept, order, keep, axis=1)
    allowed[cut] = kept
    return allowed

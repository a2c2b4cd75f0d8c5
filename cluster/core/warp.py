"""From a row of logits to the tokens that may be chosen: biases, masks, penalties, temperature, cuts.

The order is vLLM's: logit_bias, min_tokens mask, penalties, temperature, min_p, top_k, top_p. Biases are added in the
row's own dtype; penalties are computed in float64 and rounded once to it. Tokens are ranked by the result, equal ones
by lower id, also at a cut. All that follows is float64, so the outcome is a function of the row's bits and parameters.

A whole row is never sorted: the best tokens are found by a threshold, and the prefix grows only until it is proven to
hold every token that the cuts keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.core.types import SamplingParams

FloatRow = npt.NDArray[np.floating[Any]]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

FIRST_PREFIX = 64
_PREFIX_GROWTH = 8
_GROUPS_PER_TOKEN = 6
_FEWEST_PER_GROUP = 2


class History:
    """The tokens a history-dependent warp sees: prompt, output and, during the walk, the path.

    ``push`` and ``pop`` bracket a step of the walk; ``extend`` appends committed tokens. Without penalties only the
    output is counted, and a step costs next to nothing.
    """

    def __init__(
        self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self.bias_ids = np.array([token for token, _ in params.logit_bias], np.int64)
        self.biases = np.array([bias for _, bias in params.logit_bias], np.float64)
        self._output: list[int] = []
        self._tracked = params.has_penalties
        self._slots: dict[int, int] = {}
        # one slot per distinct token; a slot stays when its token is popped, with a count of zero
        self._ids = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)
        self._in_prompt = np.zeros(0, np.bool_)
        if self._tracked:
            for token in prompt_token_ids:
                slot = self._slot(int(token))
                self._in_prompt[slot] = True
        self.extend(output_token_ids)

    @property
    def output_len(self) -> int:
        """Output tokens so far, those of the path included."""
        return len(self._output)

    def push(self, token: int) -> None:
        self._output.append(int(token))
        if self._tracked:
            slot = self._slot(int(token))
            self._counts[slot] += 1

    def pop(self) -> None:
        """Undo the last ``push``. Raises ``IndexError`` where the output is empty."""
        token = self._output.pop()
        if self._tracked:
            self._counts[self._slots[token]] -= 1

    def extend(self, token_ids: Iterable[int]) -> None:
        for token in token_ids:
            self.push(token)

    def seen(self) -> tuple[Int64Array, Int64Array, npt.NDArray[np.bool_]]:
        """Distinct tokens, how often each stands in the output, and whether it stands in the prompt; each (m,).

        Raises ``ValueError`` if the history was built for parameters without penalties, because then it kept none.
        """
        if not self._tracked:
            raise ValueError("this history was built for parameters without penalties")
        m = len(self._slots)
        return self._ids[:m], self._counts[:m], self._in_prompt[:m]

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot >= len(self._ids):
            room = max(64, len(self._ids))
            self._ids = np.concatenate([self._ids, np.zeros(room, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, np.int64)])
            self._in_prompt = np.concatenate([self._in_prompt, np.zeros(room, np.bool_)])
        self._ids[slot] = token
        return slot


def constrain(row: FloatRow, params: SamplingParams, history: History, stop_ids: frozenset[int]) -> FloatRow:
    """The row after logit_bias, min_tokens mask and penalties; the row itself where none applies.

    Ids outside the vocabulary name no token and have no effect.
    """
    too_short = history.output_len < params.min_tokens and bool(stop_ids)
    if not (params.logit_bias or too_short or params.has_penalties):
        return row
    row = row.copy()
    vocab_size = row.shape[0]
    if params.logit_bias:
        known = (history.bias_ids >= 0) & (history.bias_ids < vocab_size)
        np.add.at(row, history.bias_ids[known], history.biases[known].astype(row.dtype))
    if too_short:
        row[[token for token in stop_ids if 0 <= token < vocab_size]] = -np.inf
    if params.has_penalties:
        _penalise(row, params, history)
    return row


def _penalise(row: FloatRow, params: SamplingParams, history: History) -> None:
    """vLLM's formulas, in place: repetition over prompt and output, then frequency and presence over the output."""
    ids, counts, in_prompt = history.seen()
    values = row[ids].astype(np.float64)
    repeated = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    values = np.where(in_prompt | (counts > 0), repeated, values)
    values -= params.frequency_penalty * counts
    values -= params.presence_penalty * (counts > 0)
    row[ids] = values


@dataclass(frozen=True, slots=True)
class Head:
    """The best tokens of a row after temperature, in falling order, and what the cuts leave of them.

    ids:    (m,) int64, ties by lower id.
    values: (m,) float64, (logit - highest logit) / temperature; 0 for the first, finite for all.
    kept:   the cuts keep the first ``kept`` of them.
    whole:  no other token of the row has a chance.
    shares: (m,) float64, the part of the mass top_p refers to that lies in the tokens up to and with each; None where
            top_p is 1.
    floor, limit, top_p: the cuts: the lowest value min_p keeps, how many top_k keeps, top_p.
    """

    ids: Int64Array
    values: Float64Array
    kept: int
    whole: bool
    shares: Float64Array | None
    floor: float
    limit: int
    top_p: float

    @property
    def open(self) -> bool:
        """True where tokens outside the head may be kept as well. Their values are at most ``values[-1]``.

        Only heads of rows without top_k and top_p are ever open; what lies outside is then subject to min_p alone.
        """
        return self.kept == len(self.ids) and not self.whole

    def distance(self, index: int) -> float:
        """How far token ``index`` of the head is from being cut if it is kept, and from being kept if it is cut.

        Counted as the gap of two values, or of a probability to its bound, that would have to close. top_p can also
        drop a token because others overtake it, and keep one that overtakes others, so each rank it could change to is
        weighed. With min_p and top_p both set, tokens at min_p's edge are taken to stay put.
        """
        value = float(self.values[index])
        if index < self.kept:
            away = value - self.floor
            if self.limit < len(self.values):
                away = min(away, value - float(self.values[self.limit]))
            if self.shares is not None:
                others = self.shares[index:] - (self.shares[index] - self._before(index))
                away = min(away, float(np.maximum(value - self.values[index:], self.top_p - others).min()))
                if not self.whole:
                    away = min(away, value - float(self.values[-1]))
            return away
        away = self.floor - value
        if index >= self.limit:
            away = max(away, float(self.values[self.limit - 1]) - value)
        if self.shares is not None:
            before = np.concatenate([[0.0], self.shares[:index]])
            rises = np.maximum(self.values[: index + 1] - value, before - self.top_p)
            away = max(away, float(rises.min()))
        return away

    def _before(self, index: int) -> float:
        return float(self.shares[index - 1]) if self.shares is not None and index else 0.0


def scale(logits: npt.NDArray[Any], peak: float, temperature: float) -> Float64Array:
    """(logits - peak) / temperature in float64. Nothing overflows upwards, however low the temperature."""
    values = logits.astype(np.float64)
    values -= peak
    with np.errstate(over="ignore"):
        values /= temperature
    return values


def min_p_floor(params: SamplingParams) -> float:
    """The lowest value (as in ``Head``) that min_p keeps."""
    return math.log(params.min_p) if params.min_p > 0.0 else -math.inf


def top(row: FloatRow, k: int) -> Int64Array:
    """The ids of the k highest logits, falling, ties by lower id; fewer where fewer are above -inf. 1 <= k <= vocab.

    The row is folded into groups; k groups have their maximum at or above the k-th highest maximum, so the tokens at or
    above it are at least k and hold the k best. Only these few are sorted.
    """
    groups = _GROUPS_PER_TOKEN * k
    per_group = row.shape[0] // groups
    threshold = -np.inf
    if per_group >= _FEWEST_PER_GROUP:
        maxima = row[: per_group * groups].reshape(per_group, groups).max(axis=0)
        threshold = np.partition(maxima, groups - k)[groups - k]
    ids = np.flatnonzero(row >= threshold if threshold > -np.inf else row > -np.inf)
    return ids[np.argsort(-row[ids], kind="stable")[:k]]


def rank(row: FloatRow, peak: float, params: SamplingParams) -> Head:
    """Find the head of a constrained row whose highest logit is ``peak`` (finite). The temperature must not be 0.

    The result is open only where neither top_k nor top_p is set; otherwise it holds every kept token and, unless it is
    the whole row, at least the first one that is not kept.
    """
    vocab_size = row.shape[0]
    limit = params.top_k if 0 < params.top_k < vocab_size else vocab_size
    uncut = limit == vocab_size and params.top_p == 1.0
    total = _mass(row, peak, params) if limit == vocab_size and params.top_p < 1.0 else None
    size = FIRST_PREFIX if limit == vocab_size else max(FIRST_PREFIX, limit + 1)
    while True:
        size = min(size, vocab_size)
        ids = top(row, size)
        values = scale(row[ids], peak, params.temperature)
        reachable = int(np.count_nonzero(values > -np.inf))
        ids, values = ids[:reachable], values[:reachable]
        kept, shares = _cut(values, params, limit, total)
        whole = reachable < size or size == vocab_size
        head = Head(ids, values, kept, whole, shares, min_p_floor(params), limit, params.top_p)
        if uncut or not head.open:
            return head
        size *= _PREFIX_GROWTH
        if size * _GROUPS_PER_TOKEN * _FEWEST_PER_GROUP > vocab_size:
            # ``top`` would sort the row anyway
            size = vocab_size


def _mass(row: FloatRow, peak: float, params: SamplingParams) -> float:
    """The softmax's denominator over the tokens that min_p keeps, relative to the highest logit."""
    values = scale(row, peak, params.temperature)
    if params.min_p > 0.0:
        values[values < min_p_floor(params)] = -np.inf
    return float(np.exp(values, out=values).sum())


def _cut(
    values: Float64Array, params: SamplingParams, limit: int, total: float | None
) -> tuple[int, Float64Array | None]:
    """Apply min_p, top_k and top_p to falling ``values``. Returns (how many are kept, shares as in ``Head``).

    limit: top_k, or the vocabulary's size. total: the mass top_p refers to; None where top_k bounds the tokens that
    have a part in it, which ``values`` then holds.
    """
    kept = min(limit, int(np.count_nonzero(values >= min_p_floor(params))))
    if params.top_p == 1.0:
        return kept, None
    masses = np.cumsum(np.exp(values))
    shares = masses / (masses[kept - 1] if total is None else total)
    # a token stays while the mass before it falls short of top_p
    return min(kept, 1 + int(np.count_nonzero(shares[:-1] < params.top_p))), shares

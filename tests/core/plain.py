"""The rule of docs/exactness.md written down without any cleverness: full sort, noise for every token, one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.core.noise import keyed_noise
from cluster.core.types import SamplingParams

Row = npt.NDArray[np.floating[Any]]


def constrained(row: Row, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], stops: Set[int]) -> Row:
    row = row.copy()
    for token, bias in params.logit_bias:
        row[token] += np.float32(bias)
    if len(output) < params.min_tokens:
        for token in stops:
            row[token] = -np.inf
    for token in {*prompt, *output}:
        value, count = float(row[token]), list(output).count(token)
        value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * count
        value -= params.presence_penalty * (count > 0)
        row[token] = value
    return row


def kept_tokens(row: Row, params: SamplingParams) -> set[int]:
    """What min_p, top_k and top_p leave of a constrained row, by a full stable sort."""
    order = np.argsort(-row, kind="stable")
    probs = np.exp((row[order].astype(np.float64) - float(row.max())) / params.temperature)
    keep = probs >= params.min_p
    if params.top_k > 0:
        keep[params.top_k :] = False
    probs = np.where(keep, probs, 0.0)
    total, before, kept = math.fsum(probs), 0.0, set()
    for token, prob, kept_so_far in zip(order.tolist(), probs.tolist(), keep.tolist()):
        if kept_so_far and (params.top_p == 1.0 or before / total < params.top_p):
            kept.add(token)
        before += prob
    return kept


def plain_token(
    row: Row,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    position: int,
    stops: Set[int] = frozenset(),
) -> tuple[int, float]:
    """The token of one position, and best minus second (infinite without a second)."""
    row = constrained(row, params, prompt, output, stops)
    if params.temperature == 0.0:
        sums = row.astype(np.float64)
    else:
        sums = (row.astype(np.float64) - float(row.max())) / params.temperature
        sums += keyed_noise(params.seed, position, len(row))
        outside = np.ones(len(row), np.bool_)
        outside[sorted(kept_tokens(row, params))] = False
        sums[outside] = -np.inf
    token = int(sums.argmax())
    best = sums[token]
    sums[token] = -np.inf
    return token, float(best - sums.max(initial=-np.inf))

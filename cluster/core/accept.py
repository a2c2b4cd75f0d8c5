"""Target rows and a token tree in, accepted path and bonus token out. Pure; only this file decides what is lossless.

The token at a position is *defined* as ``argmax(warp(logits) + G(seed, position))``; temperature 0 has no noise. The
walk computes that token at the root, steps to the child that carries it, and goes on there; where no child does, the
token is the bonus token and the walk ends. So the output does not depend on the tree, whoever made it and however: a
tree only decides how many tokens one round yields. docs/exactness.md has the argument and the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.core.errors import EngineFailed
from cluster.core.noise import all_bits, bits_reaching, gumbel, keyed_noise_at
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from cluster.core.warp import FloatRow, Head, History, Int64Array, constrain, rank, scale

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Decision:
    """The token of one position.

    margin: how far the decision was from tipping: best minus second of warp + noise, or, if smaller, how far the token
    is from being cut (or a cut token that would have won from being kept). In units of logits / temperature, of logits
    at temperature 0, or of probability where top_p is what comes closest. Infinite without a rival. As long as no logit
    moves by more than half the margin (times temperature), the token stays what it is.
    """

    token: int
    margin: float


@dataclass(frozen=True, slots=True)
class Accepted:
    """Outcome of a walk.

    nodes:   accepted tree nodes, a path from depth 1 down; may be empty.
    tokens:  their tokens and the bonus token: len(nodes) + 1.
    margins: one per token, see ``Decision``.
    """

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]
    margins: tuple[float, ...]


def accept(
    rows: FloatRow,
    tree: TokenTree,
    params: SamplingParams,
    history: History,
    position: int,
    stop_ids: frozenset[int],
) -> Accepted:
    """Walk the tree along the target's own tokens.

    rows:     (n + 1, vocab) logits, float32 (float64 works too): row 0 follows the root, row i + 1 follows node i. Only
              the rows that the walk visits are read.
    history:  prompt and output, built for ``params``; left as it was found.
    position: index in the sequence (prompt and output) of the first token to be chosen, that is the tree's base.
    stop_ids: tokens masked while the output is shorter than min_tokens.

    Raises ``EngineFailed`` for a first row that is not usable (see ``decide``), ``ValueError`` for a wrong row count. A
    later row that is not usable ends the walk before its node.
    """
    if len(rows) != len(tree) + 1:
        raise ValueError(f"{len(rows)} rows for a tree of {len(tree)} nodes")
    node = -1
    nodes: list[int] = []
    decisions: list[Decision] = []
    try:
        while True:
            try:
                decision = decide(rows[node + 1], params, history, position + len(nodes), stop_ids)
            except EngineFailed:
                if not nodes:
                    raise
                # Plain decoding would meet this row in a later step, or, behind a stop, never: so shall this session.
                nodes.pop()
                history.pop()
                break
            decisions.append(decision)
            child = tree.child(node, decision.token)
            if child is None:
                break
            history.push(decision.token)
            nodes.append(child)
            node = child
    finally:
        for _ in nodes:
            history.pop()
    return Accepted(tuple(nodes), tuple(d.token for d in decisions), tuple(d.margin for d in decisions))


def decide(
    row: FloatRow, params: SamplingParams, history: History, position: int, stop_ids: frozenset[int]
) -> Decision:
    """The target's token at one position, from its (vocab,) row of logits. Arguments as for ``accept``.

    -inf marks tokens that cannot be chosen. Raises ``EngineFailed`` if the row has a NaN or +inf, or nothing but -inf.
    """
    row = constrain(row, params, history, stop_ids)
    # argmax returns a NaN's place where there is one, so one look suffices
    leader = int(row.argmax())
    peak = float(row[leader])
    if not np.isfinite(peak):
        what = "allows no token" if peak == -np.inf else f"holds {peak}"
        raise EngineFailed(f"the target's row at position {position} {what}")
    if params.greedy:
        rivals = (row[:leader].max(initial=-np.inf), row[leader + 1 :].max(initial=-np.inf))
        return Decision(leader, peak - float(max(rivals)))
    head = rank(row, peak, params)
    if head.open:
        return _race(row, peak, head, params, position)
    sums = head.values + keyed_noise_at(params.seed, position, head.ids)
    decision = _choose(head.ids, sums, np.arange(len(head.ids)) < head.kept, head.distance)
    if head.whole:
        return decision
    # the tokens past the head were not given noise: count on the nearest of them to win
    return Decision(decision.token, min(decision.margin, head.distance(len(head.ids) - 1)))


def _race(row: FloatRow, peak: float, head: Head, params: SamplingParams, position: int) -> Decision:
    """Decide over a whole row without taking logarithms for all of it.

    A token outside the head is worth at most the head's last value plus its noise; to matter, even as the second, it
    must reach the head's second. That is a bound on its noise, so on its integer bits, and only the few within it join.
    """
    bits = all_bits(params.seed, position, row.shape[0])
    second = float(np.partition(head.values + gumbel(bits[head.ids]), -2)[-2])
    last = float(head.values[-1])
    rounding = 1e-9 * (1.0 + abs(second) + abs(last))
    outsiders = np.flatnonzero(bits <= bits_reaching(second - last - rounding))
    ids = np.union1d(head.ids, outsiders)
    values = scale(row[ids], peak, params.temperature)
    return _choose(
        ids, values + gumbel(bits[ids]), values >= head.floor, lambda index: abs(float(values[index]) - head.floor)
    )


def _choose(
    ids: Int64Array, sums: Float64Array, kept: npt.NDArray[np.bool_], distance: Callable[[int], float]
) -> Decision:
    """The kept token of the highest sum, ties by lower id, and its margin. All arrays are (m,).

    distance: how far the token at an index is from changing sides of the cuts; asked for the winner, and for cut tokens
    that would win or come close.
    """
    inside = np.where(kept, sums, -np.inf)
    best = inside.max()
    firsts = np.flatnonzero(inside == best)
    winner = int(firsts[ids[firsts].argmin()])
    inside[winner] = -np.inf
    margin = min(float(best - inside.max()), distance(winner))
    # a cut token must both come back and catch up
    behind = np.where(kept, np.inf, best - sums)
    rivals = np.flatnonzero(behind < margin)
    for index in rivals[np.argsort(behind[rivals])].tolist():
        if behind[index] >= margin:
            break
        margin = min(margin, max(float(behind[index]), distance(index)))
    return Decision(int(ids[winner]), max(0.0, margin))

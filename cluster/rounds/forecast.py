"""What speculation should bring, by the cost curve and measured acceptance: to be held against what it brings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.engine.step_cost import CostCurve
from cluster.rounds.cost import LiveCost
from cluster.rounds.governor import choose_nodes


@dataclass(frozen=True, slots=True)
class Forecast:
    """Against plain decoding: ``speedup``; tokens of a session's round; nodes verified for a session and round."""

    speedup: float
    tokens_per_round: float
    nodes_per_round: float


def forecast(
    rounds: Sequence[Sequence[Sequence[float]]],
    cost: LiveCost,
    max_rows: int,
    draft_s: float = 0.0,
    context: float = 0.0,
) -> Forecast:
    """What the governor's choices would bring: ``rounds`` are each session's calibrated path probabilities, by round.

    draft_s: seconds of drafting per round that nothing hides. context: mean length behind the rows.
    """
    tokens = seconds = plain_seconds = nodes = sessions = 0.0
    for scores in rounds:
        most = min(max_rows - len(scores), sum(map(len, scores)))
        steps = cost.rounds(len(scores), most + 1, context, len(scores))
        counts = choose_nodes(scores, steps)
        won = sum(sum(sorted(path, reverse=True)[:count]) for path, count in zip(scores, counts))
        tokens += len(scores) + won
        seconds += steps[sum(counts)] + draft_s
        plain_seconds += steps[0] * (len(scores) + won) / len(scores)
        nodes += sum(counts)
        sessions += len(scores)
    if not rounds:
        return Forecast(1.0, 1.0, 0.0)
    return Forecast(plain_seconds / seconds, tokens / sessions, nodes / sessions)


def flat_curve(curve: CostCurve, rows: int) -> CostCurve:
    """``curve`` as it would be on a machine where steps of up to ``rows`` rows cost what one row costs."""
    return CostCurve((1, rows), (curve.at(1), curve.at(1)))

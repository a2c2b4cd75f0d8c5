"""How many replicas a draft stage wants: one lease is one session, so Serve's count of ongoing calls is the load.

On top of that, what the workers say of themselves: where asks are overtaken by newer ones of their session before a
worker comes to them, trees are late and useless, however few sessions there are. A policy sets nothing but the number;
its bounds and delays are Serve's ``autoscaling_config``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

POLICY = "deployments.autoscaling:by_leases"
OVERTAKEN, BUSY = "overtaken_share", "busy_share"
MOST_OVERTAKEN = 0.1  # of a worker's asks, before its stage wants another one
MOST_BUSY = 0.9  # of a worker's time
LEAST_BUSY = 0.5  # a stage whose workers are busier than that gives none back but for want of sessions


def replicas_for(
    sessions: float, sessions_each: float, now: int, overtaken: Mapping[Any, float], busy: Mapping[Any, float]
) -> int:
    """Wanted replicas, ``now`` being the present number; ``overtaken`` and ``busy`` are shares by replica."""
    wanted = math.ceil(sessions / sessions_each)
    if not sessions or not now or not busy:
        return wanted
    load, late = sum(busy.values()) / len(busy), sum(overtaken.values()) / max(1, len(overtaken))
    if late > MOST_OVERTAKEN or load > MOST_BUSY:
        most = math.ceil(sessions)  # a session has one worker: more than that would idle
        return max(wanted, min(now + 1, most))
    if wanted < now and load > LEAST_BUSY:
        return min(now, math.ceil(sessions))
    return wanted


def by_leases(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """The policy as Serve calls it."""
    metrics = context.aggregated_metrics or {}
    wanted = replicas_for(
        context.total_num_requests,
        context.config.get_target_ongoing_requests(),
        context.current_num_replicas,
        metrics.get(OVERTAKEN, {}),
        metrics.get(BUSY, {}),
    )
    return wanted, {}

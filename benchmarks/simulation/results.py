"""A replay's figures. Times in milliseconds, quantiles over requests unless a name says otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.simulation.replay import Replay, Served

STEADY = (0.25, 0.75)  # of the time: without the beginning, and without the end when sessions become fewer


def figures(replay: Replay) -> dict[str, Any]:
    """Everything that is reported of a replay, as JSON."""
    served, seconds = replay.served, max(replay.seconds, 1e-12)
    tokens, rounds = sum(one.tokens for one in served), sum(one.rounds for one in served)
    drafted, accepted = sum(one.drafted for one in served), sum(one.accepted for one in served)
    return {
        "requests": len(served),
        "refused": replay.refused,
        "unfinished": sum(not one.finished for one in served),
        "tokens": tokens,
        "seconds": round(seconds, 6),
        "tokens_per_s": round(tokens / seconds, 3),
        "steady_tokens_per_s": round(steady_rate(served, seconds), 3),
        "first_token_ms": _quantiles(1e3 * (one.items[0][0] - one.arrived_s) for one in served if one.items),
        "inter_token_ms": _quantiles(_inter_token_ms(served)),
        "longest_pause_ms": _quantiles(_longest_pause_ms(served)),
        "tokens_per_round": round(tokens / max(1, rounds), 4),
        "drafted_per_round": round(drafted / max(1, rounds), 3),
        "accepted_share": round(accepted / max(1, drafted), 4),
        "target_busy": round(
            sum(target.verifier.seconds for target in replay.targets) / seconds / len(replay.targets), 4
        ),
        "rounds_by_mode": _rounds_by_mode(replay),
        "stages": {name: _stage(replay, name) for name in replay.pools},
    }


def steady_rate(served: Sequence[Served], seconds: float) -> float:
    """Tokens per second in the middle of the replay."""
    start, end = (share * seconds for share in STEADY)
    return sum(count for one in served for at, count in one.items if start <= at < end) / max(end - start, 1e-12)


def _stage(replay: Replay, name: str) -> dict[str, Any]:
    workers = replay.pools[name].workers
    pipelines = [target.pipeline for target in replay.targets if target.pipeline is not None]
    wanted = sum(pipeline.wanted for pipeline in pipelines)
    busy = [worker.busy_s / max(replay.seconds, 1e-12) for worker in workers]
    return {
        "workers": len(workers),
        "calls": sum(worker.calls for worker in workers),
        "busy": round(sum(busy) / len(busy), 4),
        "busiest": round(max(busy), 4),
        "deadline_misses": sum(pipeline.misses[name] for pipeline in pipelines),
        "late": sum(pipeline.late for pipeline in pipelines),
        "trees_wanted": wanted,
        "from_cache": round(sum(pipeline.cached for pipeline in pipelines) / max(1, wanted), 4),
        "without_tree": round(sum(pipeline.missing for pipeline in pipelines) / max(1, wanted), 4),
    }


def _rounds_by_mode(replay: Replay) -> dict[str, int]:
    rounds: dict[str, int] = {}
    for target in replay.targets:
        for mode, count in target.scheduler.governor.modes.rounds.items():
            rounds[mode] = rounds.get(mode, 0) + count
    return rounds


def _inter_token_ms(served: Iterable[Served]) -> list[float]:
    """A request's mean time between tokens, behind its first item."""
    return [
        1e3 * (one.items[-1][0] - one.items[0][0]) / (one.tokens - one.items[0][1])
        for one in served
        if one.tokens > one.items[0][1]
    ]


def _longest_pause_ms(served: Iterable[Served]) -> list[float]:
    """A request's longest time between two items."""
    return [
        1e3 * max(then - now for (now, _), (then, _) in itertools.pairwise(one.items))
        for one in served
        if len(one.items) > 1
    ]


def _quantiles(values: Iterable[float]) -> dict[str, float]:
    found = list(values)
    if not found:
        return {}
    return {f"p{share}": round(float(np.percentile(found, share)), 3) for share in (50, 95, 99)}

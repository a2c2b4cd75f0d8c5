"""What the engine counts: plain numbers, a few additions a round. ``deployments`` turns them into metrics."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from cluster.core.stats import EngineStats
from cluster.core.token_tree import MAX_NODES, TokenTree
from cluster.core.types import Origin, StreamItem
from cluster.rounds.buckets import Buckets
from cluster.rounds.session import Session

FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
REQUEST_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)


class Meter:
    """Totals since start. Filled by the engine thread, read from any."""

    def __init__(self) -> None:
        self._prompt_tokens = self._generation_tokens = 0
        self._prefix_queries = self._prefix_hits = 0
        self._drafts = self._preemptions = self._refused = 0
        self._drafted = [0] * len(Origin)
        self._accepted = [0] * len(Origin)
        self._paths = [0] * (MAX_NODES + 1)  # trees by number of accepted nodes
        self._finished: Counter[str] = Counter()
        self._first_token = Buckets(FIRST_TOKEN_S)
        self._between_tokens = Buckets(BETWEEN_TOKENS_S)
        self._request = Buckets(REQUEST_S)
        self._queue = Buckets(REQUEST_S)

    def admitted(self, session: Session, now: float) -> None:
        if session.num_admitted == 1:
            self._prompt_tokens += session.prompt_len
            self._prefix_queries += session.prompt_len
            self._prefix_hits += session.cached_tokens
            self._queue.observe(now - session.arrived_s)

    def refused(self) -> None:
        self._refused += 1

    def preempted(self) -> None:
        self._preemptions += 1

    def verified(self, tree: TokenTree, nodes: Sequence[int]) -> None:
        """A session's tree, and which of its nodes were accepted."""
        if len(tree):
            self._drafts += 1
            self._paths[len(nodes)] += 1
            for stage in tree.stages.tolist():
                self._drafted[stage] += 1
            for node in nodes:
                self._accepted[tree.stages[node]] += 1

    def emitted(self, session: Session, item: StreamItem, now: float) -> None:
        self._generation_tokens += len(item.token_ids)
        if session.last_item_s is None:
            self._first_token.observe(now - session.arrived_s)
        else:
            self._between_tokens.observe(now - session.last_item_s)
        session.last_item_s = now

    def finished(self, session: Session, reason: str, now: float) -> None:
        self._finished[reason] += 1
        self._request.observe(now - session.arrived_s)

    def snapshot(self) -> EngineStats:
        return EngineStats(
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            preemptions=self._preemptions,
            drafts=self._drafts,
            drafted=_by_stage(self._drafted),
            accepted=_by_stage(self._accepted),
            finished=dict(self._finished),
            time_to_first_token=self._first_token.snapshot(),
            inter_token_latency=self._between_tokens.snapshot(),
            request_latency=self._request.snapshot(),
            queue_time=self._queue.snapshot(),
            accepted_per_pos=_per_position(self._paths),
            refused=self._refused,
        )


def _by_stage(counts: list[int]) -> dict[str, int]:
    return {stage.name.lower(): counts[stage] for stage in (Origin.SMALL, Origin.MEDIUM)}


def _per_position(paths: Sequence[int]) -> tuple[int, ...]:
    """Trees of which more than i nodes were accepted, up to the longest path so far; ``paths[n]`` had exactly n."""
    reached = list(itertools.accumulate(reversed(paths[1:])))[::-1]
    return tuple(itertools.takewhile(bool, reached))

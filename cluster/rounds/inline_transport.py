"""``InlineTransport``: drafters in the engine's own process and thread, for engines that know drafters by transport."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.messages import DraftReply
from cluster.rounds.pipeline import ChainAsk, Deliver, Fail

VERIFIER = "here"


class InlineTransport:
    """Implements ``DraftTransport``: every reply is there when ``draft`` returns."""

    def __init__(self, workers: Mapping[str, DraftWorker]) -> None:
        """``workers``: by stage, in chain order."""
        self._workers = dict(workers)

    def open(self, session_id: str, stages: Sequence[str]) -> None:
        """Every stage is ready for every session."""

    def worker(self, session_id: str, stage: str) -> Hashable:
        return self._workers.get(stage)

    def draft(self, chains: Sequence[ChainAsk], deliver: Deliver, fail: Fail) -> None:
        for chain in chains:
            reply: DraftReply | None = None
            for stage, ask in chain.asks.items():
                reply = self._workers[stage].draft(VERIFIER, [ask], reply)
                deliver(self._workers[stage], reply)

    def leases(self) -> dict[str, int]:
        return {stage: worker.num_sessions for stage, worker in self._workers.items()}

    def close(self, session_id: str) -> None:
        for worker in self._workers.values():
            worker.end(VERIFIER, session_id)

"""Tensor-parallel ranks as threads of the test's own process: real groups, real sums, no start-up time."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from cluster.engine.tensor_parallel import RankPlan, follow


class ThreadCrew:
    def __init__(self, plans: Sequence[RankPlan]) -> None:
        self.pids: dict[str, int] = {}
        self._errors: list[str] = []
        self._threads = [threading.Thread(target=self._obey, args=(plan,), daemon=True) for plan in plans]
        for thread in self._threads:
            thread.start()

    def failure(self) -> str:
        return "; ".join(self._errors)

    def close(self) -> None:
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _obey(self, plan: RankPlan) -> None:
        try:
            follow(plan)
        except Exception as error:
            self._errors.append(f"rank {plan.shard.rank}: {error}")

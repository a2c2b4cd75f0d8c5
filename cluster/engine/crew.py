"""Tensor-parallel ranks as processes of this machine, without Ray: for offline use and for tests."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import time
from collections.abc import Sequence

from cluster.engine.collectives import RankLost
from cluster.engine.tensor_parallel import RankPlan, Recruiter, follow

CLOSE_LIMIT_S = 20.0

log = logging.getLogger(__name__)


class LocalCrew:
    """A ``Crew`` of spawned processes. They end with this one, however it ends."""

    def __init__(self, plans: Sequence[RankPlan]) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's threads' locks
        self._processes = {
            f"rank {plan.shard.rank}": spawn.Process(target=_obey, args=(plan,), daemon=True) for plan in plans
        }
        for process in self._processes.values():
            process.start()

    @property
    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self._processes.items() if process.pid is not None}

    def failure(self) -> str:
        ended = [
            f"{name} (pid {process.pid}) ended with exit code {process.exitcode}"
            for name, process in self._processes.items()
            if process.exitcode is not None
        ]
        return "; ".join(ended)

    def close(self) -> None:
        deadline = time.monotonic() + CLOSE_LIMIT_S
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()


ON_THIS_MACHINE = Recruiter(LocalCrew)


def _obey(plan: RankPlan) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for rank 0, which then says stop
    try:
        follow(plan)
    except RankLost as error:
        log.error("rank %d ends: %s", plan.shard.rank, error)
        sys.exit(1)

"""Circuit breakers: each worker of a stage has its own."""

from __future__ import annotations

import time

import pytest
from fakes import ScriptedDrafter
from pipeline_rig import PATIENCE_S, VOCAB, Rig, next_token, session, stages_of

from cluster.rounds.breaker import FORGET_AFTER_S, MISSES_TO_OPEN, PROBE_INTERVAL_S, Breakers
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.session import Session


class TwoWorkers(Rig):
    """A second worker of the stage, and a session that it drafts for."""

    def __init__(self) -> None:
        super().__init__(("small",))
        self.other = DraftWorker("small", ScriptedDrafter(next_token, vocab_size=VOCAB))
        self.its = session("other")
        self.transport.placed[self.its.id, "small"] = self.other
        self.pipeline.open(self.its, ("small",))
        self.pipeline.ask([(self.its, ("small",), 8)])
        self.transport.join()

    def both(self, timeout_s: float = PATIENCE_S) -> set[str]:
        """Commit a token and ask, for both. Returns who got a tree."""
        sessions: list[Session] = [self.session, self.its]
        for each in sessions:
            each.advance([7], [0], 0)
        self.pipeline.ask([(each, ("small",), 8) for each in sessions])
        return {name.partition("#")[0] for name in self.pipeline.collect(sessions, timeout_s)}


def test_a_worker_that_hangs_is_left_out_and_the_stages_other_workers_are_not() -> None:
    rig = TwoWorkers()
    assert rig.both() == {"s", "other"}
    rig.transport.hung = {rig.other}
    for _ in range(MISSES_TO_OPEN):
        assert rig.both(timeout_s=0.1) == {"s"}
    start = time.monotonic()
    assert rig.both() == {"s"}  # and nobody waits for the other any more
    assert time.monotonic() - start < PATIENCE_S / 2
    assert rig.pipeline.stats()["small"].breakers_open == 1
    assert rig.pipeline.reachable([rig.session.id])
    assert not rig.pipeline.reachable([rig.its.id])
    assert rig.pipeline.follows([rig.session.id, rig.its.id])  # nobody waits for a worker that is left out
    rig.transport.hung = set()
    rig.now += PROBE_INTERVAL_S + 0.1
    assert rig.both() == {"s"}  # a probe is sent along, not waited for
    rig.transport.join()
    assert rig.both() == {"s", "other"}
    assert rig.pipeline.stats()["small"].breakers_open == 0


def test_who_comes_before_a_probed_worker_is_waited_for() -> None:
    rig = Rig(("small", "medium"))
    rig.transport.hung = {"medium"}
    for _ in range(MISSES_TO_OPEN):
        rig.round(timeout_s=0.1)
    assert stages_of(rig.round()) == [1]
    rig.now += PROBE_INTERVAL_S + 0.1
    calls = rig.transport.calls
    assert stages_of(rig.round()) == [1]
    assert rig.pipeline._records["medium"].breakers.due_s(rig.transport.workers["medium"]) > rig.now  # it was probed
    assert rig.transport.calls == calls + 1


def test_only_sessions_that_are_asked_for_are_probed() -> None:
    rig = TwoWorkers()
    rig.transport.hung = {rig.other}
    for _ in range(MISSES_TO_OPEN):
        rig.both(timeout_s=0.05)
    rig.now += PROBE_INTERVAL_S + 0.1
    calls = rig.transport.calls
    assert rig.round() is not None
    assert rig.transport.calls == calls + 1


def test_a_worker_that_never_came_back_is_not_reported_for_ever() -> None:
    rig = TwoWorkers()
    rig.transport.hung = {rig.other}
    for _ in range(MISSES_TO_OPEN):
        rig.both(timeout_s=0.05)
    rig.pipeline.close(rig.its.id)
    assert rig.pipeline.stats()["small"].breakers_open == 1
    rig.now += FORGET_AFTER_S + 1.0
    assert rig.pipeline.stats()["small"].breakers_open == 0


def test_a_call_that_failed_for_want_of_a_lease_is_no_workers_fault() -> None:
    rig = TwoWorkers()
    for _ in range(MISSES_TO_OPEN):
        rig.pipeline._failed("small", None, [rig.its.id])
    assert rig.pipeline.misses["small"] == MISSES_TO_OPEN
    assert rig.both() == {"s", "other"}


@pytest.mark.parametrize("later_s", [0.5 * FORGET_AFTER_S, 1.1 * FORGET_AFTER_S])
def test_workers_nobody_heard_of_for_long_are_forgotten(later_s: float) -> None:
    breakers = Breakers()
    opened = [breakers.missed("gone", 10.0) for _ in range(MISSES_TO_OPEN)]
    assert opened == [False] * (MISSES_TO_OPEN - 1) + [True]
    breakers.missed("another", 10.0 + later_s)
    assert breakers.is_open("gone") == (later_s < FORGET_AFTER_S)
    assert breakers.openings == 1


def test_answers_in_time_close_no_open_breaker_and_late_probes_neither() -> None:
    breakers = Breakers()
    breakers.missed("one", 0.0)
    breakers.in_time("one")
    for _ in range(MISSES_TO_OPEN - 1):
        breakers.missed("one", 0.0)
    assert not breakers.is_open("one")
    breakers.missed("one", 0.0)
    breakers.in_time("one")
    assert breakers.is_open("one")
    assert breakers.due_s("one") == PROBE_INTERVAL_S
    breakers.probed("one", 2.0)
    assert not breakers.probe_answered("one", 3.0, patience_s=0.5)
    assert breakers.probe_answered("one", 3.0, patience_s=1.5)
    assert not breakers.is_open("one")


def test_a_late_answer_is_no_probes_answer() -> None:
    breakers = Breakers()
    for now in (0.0, 0.3):
        breakers.missed("worker", now)
    assert breakers.is_open("worker")
    assert not breakers.probe_answered("worker", 0.4, PATIENCE_S)
    breakers.probed("worker", 1.4)
    assert breakers.probe_answered("worker", 1.5, PATIENCE_S)
    assert not breakers.is_open("worker")

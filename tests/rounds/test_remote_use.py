"""Whether remote stages are asked, where not every session has a worker of them."""

from __future__ import annotations

import time

from pipeline_rig import PATIENCE_S, Rig, session

from cluster.rounds.modes import LEARNING_ROUNDS, MIN_ROUNDS, MIXED, PLAIN, REMOTE, ModeChooser
from cluster.rounds.pipeline import LEASE_PATIENCE_S
from cluster.rounds.remote_use import RemoteUse


class Crowded(Rig):
    """Another session, for which the stage has no room; plain decoding is known, the stage is not."""

    def __init__(self, always: bool = False) -> None:
        super().__init__(("small",))
        self.open = self.transport.open
        self.transport.open = lambda session_id, stages: None  # type: ignore[method-assign]
        self.other = session("other")
        self.pipeline.open(self.other, ())
        self.modes = ModeChooser()
        for _ in range(MIN_ROUNDS + 1):
            self.modes.observe(PLAIN, 1.0, 1.0)
        self.use = RemoteUse(self.modes, [PLAIN], self.pipeline, lambda: self.now + time.monotonic(), always=always)

    def next_mode(self) -> str:
        """A round of both sessions that is worth less than a plain one. Returns how they get the next guesses."""
        sessions = [self.session, self.other]
        for each in sessions:
            each.advance([7], [0], 0)
        self.use.ask([(each, 8) for each in sessions])
        self.pipeline.collect(sessions, PATIENCE_S)
        if self.use.mode != MIXED:
            self.modes.observe(self.use.mode, 1.0, 1.0 if self.use.mode == PLAIN else 1.5)
        return self.use.mode


def test_a_trial_ends_although_some_session_never_gets_a_worker() -> None:
    rig = Crowded()
    assert {rig.next_mode() for _ in range(5)} == {PLAIN}  # it may still get one: the stage only catches up
    rig.now += LEASE_PATIENCE_S
    modes = [rig.next_mode() for _ in range(LEARNING_ROUNDS + 5)]
    assert modes == [REMOTE] * (LEARNING_ROUNDS + 1) + [PLAIN] * 4  # the first round is not measured
    assert rig.modes.rounds[REMOTE] == LEARNING_ROUNDS


def test_a_round_in_which_a_session_has_its_worker_but_no_tree_yet_is_measured_for_none() -> None:
    rig = Crowded(always=True)
    rig.now += LEASE_PATIENCE_S
    rig.open(rig.other.id, ("small",))
    assert rig.next_mode() == MIXED  # the worker is sent the session's start
    rig.transport.join()
    assert rig.next_mode() == REMOTE

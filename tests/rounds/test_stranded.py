"""Sessions that cannot be drafted for, whatever the reason, hold up nobody who can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fakes import ScriptedDrafter
from pipeline_rig import VOCAB, Rig, next_token, session

from cluster.core.token_tree import TokenTree
from cluster.rounds.breaker import MISSES_TO_OPEN
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.pipeline import LEASE_PATIENCE_S, MAX_REFUSALS, START_INTERVAL_S
from cluster.rounds.session import Session
from drafters.base import Ask


def follow(rig: Rig, session: Session) -> None:
    """The stage is sent the session's start, and then asked for a tree."""
    for _ in range(2):
        rig.pipeline.ask([(session, ("small",), 8)])
        rig.transport.join()


def beside_a_hung_worker() -> tuple[Rig, Session, DraftWorker]:
    """A rig, another session, and the worker of its own that never answers."""
    rig, other = Rig(("small",)), session("other")
    hung = DraftWorker("small", ScriptedDrafter(next_token, vocab_size=VOCAB))
    rig.transport.placed[other.id, "small"] = hung
    rig.pipeline.open(other, rig.pipeline.stages)
    rig.transport.hung = {hung}
    return rig, other, hung


def test_sessions_all_of_whose_workers_are_left_out_hold_nobody_up() -> None:
    rig, other, broken = beside_a_hung_worker()
    assert not rig.pipeline.follows([rig.session.id, other.id])
    for _ in range(MISSES_TO_OPEN):
        rig.pipeline._failed("small", broken, [other.id])
    assert rig.pipeline.broken
    assert rig.pipeline.follows([rig.session.id, other.id])


def test_a_session_whose_worker_never_confirms_its_start_holds_nobody_up_for_long() -> None:
    rig, other, _ = beside_a_hung_worker()
    rig.pipeline.ask([(other, ("small",), 8)])
    assert not rig.pipeline.follows([rig.session.id, other.id])
    rig.now += LEASE_PATIENCE_S
    assert rig.pipeline.follows([rig.session.id, other.id])
    rig.transport.hung = set()
    follow(rig, other)
    assert not rig.pipeline.stranded(other.id)


def test_a_session_that_lost_its_worker_holds_nobody_up_for_long() -> None:
    rig = Rig(("small",))
    other = session("other")
    rig.pipeline.open(other, rig.pipeline.stages)
    follow(rig, other)
    assert rig.pipeline.follows([rig.session.id, other.id])
    rig.transport.close(other.id)
    assert not rig.pipeline.follows([rig.session.id, other.id])
    rig.now += LEASE_PATIENCE_S
    assert rig.pipeline.follows([rig.session.id, other.id])


def test_a_worker_that_comes_late_has_its_time_to_confirm_the_start() -> None:
    rig = Rig(("small",))
    other = session("other")
    rig.pipeline.open(other, rig.pipeline.stages)
    rig.now += LEASE_PATIENCE_S + 1.0
    assert not rig.pipeline.stranded(other.id)
    rig.pipeline.ask([(other, ("small",), 8)])
    assert not rig.pipeline.stranded(other.id)


def test_a_session_that_gets_no_worker_holds_nobody_up_for_long() -> None:
    rig = Rig(("small",))
    other = session("other")
    rig.pipeline.open(other, rig.pipeline.stages)
    rig.transport.close(other.id)
    assert not rig.pipeline.follows([rig.session.id, other.id])
    rig.now += LEASE_PATIENCE_S
    assert rig.pipeline.follows([rig.session.id, other.id])
    assert not rig.pipeline.follows(["unknown"])


def test_a_session_that_its_worker_keeps_refusing_holds_no_other_up() -> None:
    rig = Rig(("small",))
    other = session("picked on")
    rig.pipeline.open(other, ("small",))
    begin = rig.drafters["small"].begin
    refused: list[str] = []

    def picky(session_id: str, *rest: Any, **more: Any) -> None:
        if "picked on" in session_id:
            refused.append(session_id)
            raise RuntimeError("not this one")
        begin(session_id, *rest, **more)

    rig.drafters["small"].begin = picky  # type: ignore[method-assign]
    for at in range(MAX_REFUSALS):
        assert not rig.pipeline.follows([rig.session.id, other.id])
        rig.pipeline.ask([(rig.session, ("small",), 8), (other, ("small",), 8)])
        rig.transport.join()
        assert len(refused) == at + 1, "it is tried again"
        rig.now += START_INTERVAL_S + 0.1
    assert rig.pipeline.follows([rig.session.id, other.id])
    rig.drafters["small"].begin = begin  # type: ignore[method-assign]
    follow(rig, other)
    assert not rig.pipeline.stranded(other.id)


def test_nor_does_one_that_is_taken_and_then_lost_each_time() -> None:
    rig = Rig(("small",))
    other = session("picked on")
    rig.pipeline.open(other, ("small",))
    propose = rig.drafters["small"].propose

    def picky(asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        if any("picked on" in ask.session_id for ask in asks):
            raise RuntimeError("not this one")
        return propose(asks, upstream)

    rig.drafters["small"].propose = picky  # type: ignore[method-assign]
    for _ in range(2 * MAX_REFUSALS):
        rig.pipeline.ask([(other, ("small",), 8)])
        rig.transport.join()
        rig.now += START_INTERVAL_S + 0.1
    assert rig.pipeline.stranded(other.id)

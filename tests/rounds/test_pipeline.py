"""The pipeline over a misbehaving transport: deadlines, newest wins, resync, circuit breaker. No engine needed."""

from __future__ import annotations

import time

import pytest
from fakes import InProcessTransport, ScriptedDrafter

from cluster.core.token_tree import TokenTree
from cluster.core.types import GenerateRequest, Origin, SamplingParams
from cluster.rounds.detokenize import TextStream
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.messages import DraftReply, StageReport
from cluster.rounds.pipeline import MISSES_TO_OPEN, Pipeline
from cluster.rounds.session import Limits, Session
from drafters.base import Ask

VOCAB = 1000
PATIENCE_S = 5.0  # longer than any reply takes; waiting ends when the reply is there


class SilentDecoder:
    def step(self, token: int) -> str:
        return ""


def session(name: str = "s", prompt: int = 4) -> Session:
    request = GenerateRequest(name, tuple(range(prompt)), SamplingParams(max_tokens=500))
    return Session(request, Limits(10_000, frozenset()), TextStream(SilentDecoder()))


def next_token(tokens: list[int], ask: Ask) -> TokenTree:
    """A tree that tells which state it was made for."""
    return TokenTree.chain([len(tokens)], stage=Origin.SMALL)


def medium_of(tokens: list[int], ask: Ask) -> TokenTree:
    return TokenTree.chain([len(tokens)], stage=Origin.MEDIUM)


class Rig:
    """A pipeline with one worker per stage, and a session that is ready to be asked about."""

    def __init__(self, stages: tuple[str, ...] = ("small", "medium")) -> None:
        makers = {"small": next_token, "medium": medium_of}
        self.drafters = {stage: ScriptedDrafter(makers[stage], vocab_size=VOCAB) for stage in stages}
        self.transport = InProcessTransport({stage: DraftWorker(stage, self.drafters[stage]) for stage in stages})
        self.now = 0.0
        self.pipeline = Pipeline(self.transport, stages, VOCAB, 16, clock=lambda: self.now + time.monotonic())
        self.session = session()
        self.pipeline.open(self.session, stages)
        self.ask()
        self.transport.join()

    def ask(self) -> None:
        self.pipeline.ask([(self.session, self.pipeline.stages, 8)])

    def commit(self, *tokens: int) -> None:
        self.session.advance(tokens, [Origin.TARGET] * len(tokens), 0)

    def round(self, timeout_s: float = PATIENCE_S) -> TokenTree | None:
        """Commit a token, ask, collect."""
        self.commit(7)
        self.ask()
        return self.pipeline.collect([self.session], timeout_s).get(self.session.id)


def test_a_tree_comes_back_for_the_state_it_was_asked_for() -> None:
    rig = Rig()
    for _ in range(5):
        tree = rig.round()
        assert tree is not None
        assert tree.key == rig.session.key
        assert tree.tokens.tolist() == [rig.session.base]
        assert tree.stages.tolist() == [Origin.MEDIUM]


def test_no_round_waits_for_a_drafter_that_does_not_hold_the_session_yet() -> None:
    rig = Rig()
    rig.pipeline.open(other := session("other"), rig.pipeline.stages)
    rig.pipeline.ask([(other, rig.pipeline.stages, 8)])
    start = time.monotonic()
    assert rig.pipeline.collect([other], PATIENCE_S) == {}
    assert time.monotonic() - start < PATIENCE_S / 2
    rig.transport.join()
    rig.pipeline.ask([(other, rig.pipeline.stages, 8)])
    assert "other" in rig.pipeline.collect([other], PATIENCE_S)


def test_a_late_tree_is_not_used_for_another_state() -> None:
    rig = Rig()
    rig.transport.delay_s = (0.05, 0.05)
    assert rig.round(timeout_s=0.0) is None
    rig.commit(3)
    rig.transport.join()
    assert rig.pipeline.collect([rig.session], 0.0) == {}
    assert rig.pipeline.late == 1


def test_every_second_reply_lost_or_doubled_still_gives_only_right_trees() -> None:
    rig = Rig()
    rig.transport.drop, rig.transport.duplicate, rig.transport.delay_s = 0.3, 0.5, (0.0, 0.01)
    found = 0
    for _ in range(60):
        rig.now += 2.0  # past the breaker's probe interval, so that losses do not end the test early
        tree = rig.round(timeout_s=0.05)
        found += tree is not None
        assert tree is None or tree.key == rig.session.key
    assert found > 10
    for drafter in rig.drafters.values():
        held = drafter.tokens["test/s"]
        assert held == rig.session.tokens[: len(held)]


def test_a_worker_that_lost_the_session_is_sent_it_again() -> None:
    rig = Rig()
    rig.transport.workers["medium"].end("test", "s")
    assert rig.round() is None
    rig.ask()
    rig.transport.join()
    assert rig.round() is not None


def test_a_stage_that_misses_twice_is_left_out_until_a_probe_succeeds() -> None:
    rig = Rig()
    rig.transport.hung = {"medium"}
    for _ in range(MISSES_TO_OPEN):
        assert rig.round(timeout_s=0.02) is None
    assert rig.pipeline.misses["medium"] == MISSES_TO_OPEN
    tree = rig.round()  # without medium: small's own tree comes back, and nobody waits for medium
    assert tree is not None
    assert tree.stages.tolist() == [Origin.SMALL]
    rig.transport.hung = set()
    rig.now += 1.5
    rig.round()  # a probe is sent along, not waited for
    rig.transport.join()
    tree = rig.round()
    assert tree is not None
    assert tree.stages.tolist() == [Origin.MEDIUM]


def test_a_dead_stage_is_noticed_at_once() -> None:
    rig = Rig()
    rig.transport.dead = {"medium"}
    start = time.monotonic()
    assert rig.round() is None
    assert time.monotonic() - start < PATIENCE_S / 2
    assert rig.pipeline.misses["medium"] == 1


def test_both_stages_recover_although_each_was_probed_while_the_other_was_broken() -> None:
    rig = Rig()
    rig.transport.dead = {"small", "medium"}
    for _ in range(6):
        rig.round(timeout_s=0.02)
    assert rig.round(timeout_s=0.02) is None
    rig.transport.dead = set()
    for _ in range(4):
        rig.now += 1.5
        rig.round(timeout_s=0.02)
        rig.transport.join()
    tree = rig.round()
    assert tree is not None
    assert tree.stages.tolist() == [Origin.MEDIUM]


@pytest.mark.parametrize("tokens", [[VOCAB], [-1], list(range(17))])
def test_a_tree_that_breaks_the_rules_is_refused(tokens: list[int]) -> None:
    rig = Rig(("small",))
    rig.drafters["small"].make = lambda held, ask: TokenTree.chain(tokens, stage=1)
    assert rig.round() is None
    assert rig.pipeline.refused == 1


def test_replies_for_unknown_sessions_and_stages_are_ignored() -> None:
    rig = Rig()
    key = session("gone").key
    rig.pipeline._deliver(DraftReply({"gone": TokenTree.chain([1], key=key)}, (StageReport("large", 1, {"gone": 3}),)))
    assert rig.round() is not None


def test_close_frees_the_session_everywhere() -> None:
    rig = Rig()
    rig.pipeline.close("s")
    rig.pipeline.close("s")
    rig.transport.join()
    assert rig.pipeline.num_sessions == 0
    assert all(drafter.tokens == {} for drafter in rig.drafters.values())

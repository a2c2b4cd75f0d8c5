"""A draft worker follows commits whatever order, repetition or loss they arrive with."""

from __future__ import annotations

import itertools
import random

import pytest
from fakes import FailingDrafter, ScriptedDrafter

from cluster.core.errors import EngineDied
from cluster.core.token_tree import TokenTree
from cluster.core.types import Commit, SamplingParams, TreeKey, digest_of
from cluster.rounds.draft_worker import END_MEMORY_S, DraftWorker
from cluster.rounds.messages import DraftAsk, DraftReply, SessionStart
from drafters.base import Ask

TOKENS = list(range(10, 60))


def key(base: int, epoch: int = 0) -> TreeKey:
    return TreeKey("s", epoch, base, digest_of(TOKENS[:base]))


def start(base: int, epoch: int = 0) -> DraftAsk:
    begin = SessionStart(tuple(TOKENS[:base]), 3, SamplingParams())
    return DraftAsk(Commit(key(base, epoch), base, ()), 4, 4, begin)


def follow(base: int, to: int, epoch: int = 0) -> DraftAsk:
    return DraftAsk(Commit(key(to, epoch), base, tuple(TOKENS[base:to])), 4, 4)


def worker() -> tuple[DraftWorker, ScriptedDrafter]:
    drafter = ScriptedDrafter(lambda tokens, ask: TokenTree.chain([tokens[-1]], stage=1))
    return DraftWorker("small", drafter), drafter


def test_a_session_it_does_not_hold_is_asked_for_again() -> None:
    host, _ = worker()
    reply = host.draft("v", [follow(3, 4)])
    assert reply.trees == {}
    assert reply.reports[-1].resync == ("s",)


def test_it_follows_commits_and_stamps_the_key() -> None:
    host, drafter = worker()
    assert host.draft("v", [start(5)]).trees["s"].key == key(5)
    assert host.draft("v", [follow(5, 8)]).trees["s"].key == key(8)
    assert drafter.tokens["v/s"] == TOKENS[:8]


def test_the_drafter_learns_whose_session_it_is() -> None:
    host, drafter = worker()
    begin = SessionStart((1, 2), 1, SamplingParams(), "me")
    host.draft("v", [DraftAsk(Commit(TreeKey("s", 0, 2, 1), 2, ()), 0, 0, begin)])
    assert drafter.owners == {"v/s": "me"}


def test_a_repeated_or_overlapping_commit_is_trimmed() -> None:
    host, drafter = worker()
    host.draft("v", [start(5)])
    host.draft("v", [follow(5, 8)])
    assert host.draft("v", [follow(5, 8)]).trees["s"].key == key(8)
    host.draft("v", [follow(6, 10)])
    assert drafter.tokens["v/s"] == TOKENS[:10]


def test_an_old_commit_gets_no_tree_and_does_no_harm() -> None:
    host, drafter = worker()
    host.draft("v", [start(5)])
    host.draft("v", [follow(5, 9)])
    late = host.draft("v", [follow(5, 7)])
    assert late.trees == {}
    assert late.reports[-1].held == {"s": 9}
    assert late.reports[-1].resync == ()
    assert drafter.tokens["v/s"] == TOKENS[:9]


def test_a_gap_asks_for_a_resync_of_that_session_only() -> None:
    host, _ = worker()
    host.draft("v", [start(5)])
    other = DraftAsk(Commit(TreeKey("o", 0, 2, 1), 2, ()), 1, 1, SessionStart((1, 2), 1, SamplingParams()))
    reply = host.draft("v", [follow(7, 9), other])
    assert reply.reports[-1].resync == ("s",)
    assert set(reply.trees) == {"o"}


def test_a_higher_epoch_needs_a_start_and_then_replaces_the_session() -> None:
    host, drafter = worker()
    host.draft("v", [start(9)])
    assert host.draft("v", [follow(4, 6, epoch=1)]).reports[-1].resync == ("s",)
    assert host.draft("v", [start(6, epoch=1)]).trees["s"].key == key(6, 1)
    assert drafter.tokens["v/s"] == TOKENS[:6]
    assert host.draft("v", [follow(9, 11)]).trees == {}


def test_verifiers_do_not_see_each_others_sessions() -> None:
    host, _ = worker()
    host.draft("v", [start(5)])
    assert host.draft("w", [follow(5, 6)]).reports[-1].resync == ("s",)


def test_end_frees_the_session() -> None:
    host, drafter = worker()
    host.draft("v", [start(5)])
    host.end("v", "s")
    host.end("v", "s")
    assert host.num_sessions == 0
    assert drafter.tokens == {}


def test_upstream_trees_of_another_state_are_not_shown_to_the_drafter() -> None:
    seen: list[set[str]] = []

    class Recorder(ScriptedDrafter):
        def propose(self, asks, upstream):  # type: ignore[no-untyped-def]
            seen.append(set(upstream))
            return super().propose(asks, upstream)

    host = DraftWorker("medium", Recorder(lambda tokens, ask: TokenTree.empty(), vocab_size=100))
    good = TokenTree.chain([1], stage=1, key=key(5))
    stale = TokenTree.chain([1], stage=1, key=key(4))
    rubbish = TokenTree.chain([1000], stage=1, key=key(5))
    for tree in (good, stale, rubbish):
        host.draft("v", [start(5)], DraftReply({"s": tree}))
    assert seen == [{"v/s"}, set(), set()]


def test_a_session_nobody_asks_about_is_dropped_even_if_nobody_ends_it() -> None:
    now = 0.0
    drafter = ScriptedDrafter(lambda tokens, ask: TokenTree.empty())
    host = DraftWorker("small", drafter, ttl_s=30.0, clock=lambda: now)
    host.draft("v", [start(5)])
    now = 29.0
    host.draft("w", [start(5)])
    now = 31.0
    host.draft("w", [])
    assert set(drafter.tokens) == {"w/s"}
    assert host.num_sessions == 1


@pytest.mark.parametrize("where", ["begin", "propose", "commit"])
def test_a_drafter_that_raises_costs_its_own_session_only(where: str) -> None:
    class Picky(FailingDrafter):
        def _fail(self, what: str) -> None:
            if self.failing:
                super()._fail(what)

        failing = False

    drafter = Picky(lambda tokens, ask: TokenTree.chain([tokens[-1]], stage=1), where)
    host = DraftWorker("small", drafter)
    host.draft("v", [start(5)])
    drafter.failing = True
    other = DraftAsk(Commit(TreeKey("o", 0, 2, 1), 2, ()), 1, 1, SessionStart((1, 2), 1, SamplingParams()))
    bad = host.draft("v", [other if where == "begin" else follow(5, 8)])
    assert bad.trees == {}
    assert bad.reports[-1].held == {}
    assert bad.reports[-1].resync == (("o",) if where == "begin" else ("s",))  # nobody waits for an answer
    drafter.failing = False
    assert host.draft("v", [other]).trees.keys() == {"o"}


def test_the_end_of_a_models_ranks_is_no_sessions_fault() -> None:
    """The process has to end: no session would ever get another tree from it."""

    def gone(tokens: list[int], ask: Ask) -> TokenTree:
        raise EngineDied("tensor parallel: rank 1 died")

    host = DraftWorker("medium", ScriptedDrafter(gone))
    with pytest.raises(EngineDied, match="rank 1"):
        host.draft("v", [start(5)])


def test_any_storm_of_lost_doubled_and_reordered_asks_ends_in_the_right_state() -> None:
    rng = random.Random(3)
    drafter = ScriptedDrafter(lambda tokens, ask: TokenTree.chain([tokens[-1]], stage=1))
    host = DraftWorker("small", drafter, clock=itertools.count().__next__)
    acked, base, pending = None, 5, []
    for _ in range(300):
        base = min(base + rng.randint(1, 3), len(TOKENS)) if base < len(TOKENS) else 5
        if base == 5:
            host.end("v", "s")
            acked, pending = None, []
        pending.append(start(base) if acked is None else follow(acked, base))
        rng.shuffle(pending)
        while pending and rng.random() < 0.6:
            ask = pending.pop()
            for _ in range(rng.randint(0, 2)):
                report = host.draft("v", [ask]).reports[-1]
                acked = None if report.resync else report.held.get("s", acked)
                if "v/s" in drafter.tokens:
                    held = drafter.tokens["v/s"]
                    assert held == TOKENS[: len(held)]


def test_a_start_that_its_sessions_end_has_overtaken_begins_nothing() -> None:
    now = 0.0
    drafter = ScriptedDrafter(lambda tokens, ask: TokenTree.chain([tokens[-1]], stage=1))
    host = DraftWorker("small", drafter, clock=lambda: now)
    host.end("v", "s")
    assert host.draft("v", [start(5)]).reports[-1].resync == ("s",)
    assert host.num_sessions == 0
    now = END_MEMORY_S
    assert host.draft("v", [start(5)]).trees["s"].key == key(5)


def test_a_session_that_was_set_aside_begins_again_at_once() -> None:
    drafter = ScriptedDrafter(lambda tokens, ask: TokenTree.chain([tokens[-1]], stage=1))
    host = DraftWorker("small", drafter, clock=lambda: 0.0)
    host.draft("v", [start(5)])
    host.end("v", "s")
    assert host.draft("v", [start(5)]).reports[-1].resync == ("s",)  # from before it was set aside
    assert host.draft("v", [start(6)]).trees["s"].key == key(6)

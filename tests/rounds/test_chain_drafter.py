"""Chains for another engine's rows: matched by text, looked up in trees drafted earlier, as long as they pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from fakes import InProcessTransport, ScriptedDrafter

from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin
from cluster.rounds.chain_drafter import STEP_NODES, ChainDrafter, best_chain
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.local_drafter import LocalDrafter
from cluster.rounds.messages import DraftReply
from cluster.rounds.modes import LEARNING_ROUNDS, REMOTE
from cluster.rounds.pipeline import ChainAsk, Deliver, Fail, Pipeline
from cluster.rounds.rows import FORGET_AFTER_S, LINGER_S, Row, RowTexts
from cluster.rounds.step_times import MIN_STEPS, MOST_OUTLIERS, PROBE_STEPS, ChainLengths, StepTimes
from drafters.base import Ask

VOCAB = 1000


def row(tokens: list[int], new: int, max_drafts: int = 4) -> Row:
    return Row(np.array(tokens, np.int32), new, max_drafts)


def count_on(tokens: list[int], ask: Ask) -> TokenTree:
    """Guesses that every token is one more than the last."""
    length = min(ask.max_nodes, ask.max_depth)
    return TokenTree.chain([(tokens[-1] + 1 + i) % VOCAB for i in range(length)], stage=Origin.SMALL)


class InlineTransport:
    """A ``DraftTransport`` whose every reply is there when ``draft`` returns."""

    def __init__(self, workers: Mapping[str, DraftWorker]) -> None:
        self.workers = workers

    def open(self, session_id: str, stages: Sequence[str]) -> None:
        pass

    def worker(self, session_id: str, stage: str) -> DraftWorker:
        return self.workers[stage]

    def draft(self, chains: Sequence[ChainAsk], deliver: Deliver, fail: Fail) -> None:
        for chain in chains:
            reply: DraftReply | None = None
            for stage, ask in chain.asks.items():
                reply = self.workers[stage].draft("test", [ask], reply)
                deliver(self.workers[stage], reply)

    def leases(self) -> dict[str, int]:
        return {}

    def close(self, session_id: str) -> None:
        for worker in self.workers.values():
            worker.end("test", session_id)

    def stop(self) -> None:
        pass


def remote_stage(drafter: ScriptedDrafter) -> Pipeline:
    workers = {"small": DraftWorker("small", drafter)}
    return Pipeline(InlineTransport(workers), ["small"], VOCAB, 16)


class Rig:
    """A chain drafter whose clock only moves when told to. ``governed``: remote stages are used where they pay."""

    def __init__(
        self, outcomes: bool = False, inline: bool = True, local: LocalDrafter | None = None, governed: bool = False
    ) -> None:
        self.now = 100.0
        self.seconds = lambda: 0.02  # of the step behind the last call
        self.drafter = ScriptedDrafter(count_on, vocab_size=VOCAB)
        workers = {"small": DraftWorker("small", self.drafter)}
        self.transport = InlineTransport(workers) if inline else InProcessTransport(workers)
        self.pipeline = Pipeline(self.transport, ["small"], VOCAB, 16, clock=lambda: self.now, outcomes=outcomes)
        self.chains = ChainDrafter(local, always=not governed, clock=lambda: self.now, thread=False)
        self.chains.join(self.pipeline)

    def step(self, *rows: Row) -> list[list[int]]:
        self.now += self.seconds()
        self.chains.learn()
        return self.chains.propose(rows)


def test_a_row_is_known_by_its_text() -> None:
    texts = RowTexts()
    ((first, new),) = texts.follow([row([1, 2, 3, 4], 1)], 0.0)
    assert first is not None
    assert new
    ((other, new),) = texts.follow([row([9, 9, 9, 9], 1)], 0.0)
    assert new
    found = texts.follow([row([9, 9, 9, 9, 5], 1), row([1, 2, 3, 4, 5, 6], 2)], 0.0)  # the batch was condensed
    assert found == [(other, False), (first, False)]
    assert first.tokens == [1, 2, 3, 4, 5, 6]
    assert first.prompt_len == 3


def test_rows_of_equal_text_are_followed_apart() -> None:
    texts = RowTexts()
    one, two = (text for text, _ in texts.follow([row([1, 2, 3], 1), row([1, 2, 3], 1)], 0.0))
    assert one is not two
    after = texts.follow([row([1, 2, 3, 4], 1), row([1, 2, 3, 7], 1)], 0.0)
    assert {id(text) for text, _ in after} == {id(one), id(two)}
    assert [text.tokens[-1] for text, _ in after if text] == [4, 7]


def test_rows_without_new_tokens_or_wish_are_not_followed() -> None:
    texts = RowTexts()
    assert texts.follow([row([1, 2, 3], 0), row([1, 2, 3], 1, max_drafts=0)], 0.0) == [(None, False), (None, False)]
    assert len(texts) == 0


def test_guesses_follow_the_rows_through_a_batch_that_changes() -> None:
    rig = Rig()
    assert rig.step(row([5, 6, 7], 1)) == [[]]  # the drafter hears of it
    assert rig.step(row([5, 6, 7, 8], 1)) == [[9, 10, 11, 12]]
    chains = rig.step(row([40, 41], 1), row([1, 2, 3], 0), row([5, 6, 7, 8, 9, 30], 2))
    assert chains == [[], [], [31, 32, 33, 34]]
    assert rig.step(row([40, 41, 42], 1, max_drafts=2))[0] == [43, 44]


def test_a_row_that_ended_is_forgotten_everywhere() -> None:
    rig = Rig()
    rig.step(row([5, 6, 7], 1))
    rig.step(row([5, 6, 7, 8], 1))
    assert len(rig.drafter.tokens) == rig.pipeline.num_sessions == 1
    rig.now += FORGET_AFTER_S + 0.1
    rig.chains.reap()
    assert len(rig.drafter.tokens) == rig.pipeline.num_sessions == 1  # it may be in a long step
    rig.step(row([30, 31], 1))
    rig.chains.reap()
    assert len(rig.drafter.tokens) == rig.pipeline.num_sessions == 1  # the new one
    rig.now += LINGER_S + 0.1
    rig.chains.reap()
    assert len(rig.drafter.tokens) == rig.pipeline.num_sessions == 0


def test_tokens_that_walk_into_an_earlier_tree_find_the_next_chain_there() -> None:
    rig = Rig(outcomes=True, inline=False)
    rig.step(row([5, 6, 7], 1))
    rig.transport.join()
    rig.step(row([5, 6, 7, 8], 1))
    rig.transport.join()  # the tree for [.. 8] comes while the engine works on its next step
    rig.transport.hung = {"small"}
    assert rig.step(row([5, 6, 7, 8, 9, 10], 2)) == [[11, 12, 13, 14]]
    report = rig.chains.report()
    assert report.cached == 1
    assert report.waited_s == 0.0


@pytest.mark.parametrize(("rows", "nodes"), [(1, 768), (32, STEP_NODES // 32)])
def test_stages_are_asked_for_trees_of_outcomes_which_are_smaller_where_rows_are_many(rows: int, nodes: int) -> None:
    asks: list[Ask] = []

    def guess(tokens: list[int], ask: Ask) -> TokenTree:
        asks.append(ask)
        return count_on(tokens, ask)

    transport = InlineTransport({"small": DraftWorker("small", ScriptedDrafter(guess, vocab_size=VOCAB))})
    chains = ChainDrafter(None, always=True, thread=False)
    chains.join(Pipeline(transport, ["small"], VOCAB, 768, outcomes=True))
    chains.propose([row([5, 6, first], 1) for first in range(rows)])
    chains.propose([row([5, 6, first, 7], 1) for first in range(rows)])
    assert [(ask.max_nodes, ask.outcomes) for ask in asks] == [(nodes, True)] * rows


def test_what_promises_little_is_used_only_where_nothing_better_comes() -> None:
    rig = Rig(outcomes=True, inline=False)

    def unsure(tokens: list[int], ask: Ask) -> TokenTree:
        tree = count_on(tokens, ask)
        return TokenTree.build(tree.tokens, tree.parents, 0.1 ** np.arange(2, len(tree) + 2), Origin.SMALL)

    rig.drafter.make = unsure
    rig.step(row([5, 6, 7], 1))
    rig.transport.join()
    rig.step(row([5, 6, 7, 8], 1))
    rig.transport.join()
    rig.transport.hung = {"small"}
    rig.chains._lengths.choose = lambda rows, scores: [len(path) for path in scores]  # type: ignore[method-assign]
    assert rig.step(row([5, 6, 7, 8, 9, 10, 11], 3)) == [[12, 13, 14, 15]]
    assert rig.chains.report().cached == 1


def test_a_silent_stage_is_left_out_after_some_steps() -> None:
    rig = Rig(outcomes=True)
    rig.step(row([5, 6, 7], 1))
    tokens = [5, 6, 7]
    rig.transport.draft = lambda chains, deliver, fail: None
    for _ in range(40):
        tokens.append(1)
        rig.step(row(list(tokens), 1))
    assert rig.pipeline.stats()["small"].breakers_open


def always_five(tokens: list[int], ask: Ask) -> TokenTree:
    return TokenTree.chain([5] * min(ask.max_nodes, ask.max_depth), stage=Origin.SMALL)


def local_source(guess: Callable[[list[int], Ask], TokenTree]) -> LocalDrafter:
    return LocalDrafter("small", ScriptedDrafter(guess, vocab_size=VOCAB), VOCAB, 16)


def count(rig: Rig, steps: int, beside: bool = False) -> int:
    """So many steps of a target whose every token is one more than the last. Returns how many tokens they yielded.
    ``beside``: another row wants no guesses."""
    tokens, chain = [40, 41], list[int]()
    for at in range(steps):
        wanted = [(tokens[-1] + 1 + i) % VOCAB for i in range(len(chain) + 1)]
        right = next((i for i, (a, b) in enumerate(zip(chain, wanted)) if a != b), len(chain))
        tokens += wanted[: right + 1]
        others = [row([7] * (at + 2), 1, max_drafts=0)] if beside else []
        chain, *_ = rig.step(row(list(tokens), right + 1), *others)
    return len(tokens) - 2


def test_a_local_drafter_fills_in_while_remote_stages_are_silent() -> None:
    rig = Rig(inline=False, local=local_source(count_on), governed=True)
    rig.transport.hung = {"small"}
    assert count(rig, 300) > 1400
    assert rig.chains.report().stages == {"local": ("small",), "remote": ("small",)}


@pytest.mark.parametrize("remote_is_better", [True, False])
def test_of_local_and_remote_guesses_the_better_are_used(remote_is_better: bool) -> None:
    guesses = [always_five, count_on]
    rig = Rig(local=local_source(guesses[not remote_is_better]), governed=True)
    rig.drafter.make = guesses[remote_is_better]
    count(rig, 200)
    before = rig.chains.report().remote_steps
    assert before > 0
    yielded = count(rig, 400)
    share = (rig.chains.report().remote_steps - before) / 400
    assert share > 0.9 if remote_is_better else share < 0.1
    assert yielded > 1600


@pytest.mark.parametrize(
    ("guess", "slower", "pays"), [(count_on, 1.5, True), (always_five, 1.0, False), (count_on, 6.0, False)]
)
def test_where_there_is_no_local_drafter_remote_stages_are_used_as_far_as_they_pay(
    guess: Callable[[list[int], Ask], TokenTree], slower: float, pays: bool
) -> None:
    """``slower``: what remote drafting makes of a step, whatever comes of it."""
    rig = Rig(governed=True)
    rig.drafter.make = guess
    rig.seconds = lambda: 0.02 * (slower if rig.chains._mode == REMOTE else 1.0)
    count(rig, 300)
    before = rig.chains.report().remote_steps
    assert before > LEARNING_ROUNDS / 2
    count(rig, 600)
    share = (rig.chains.report().remote_steps - before) / 600
    assert share > 0.9 if pays else share < 0.1


def test_a_row_that_wants_no_guesses_does_not_keep_the_others_from_the_better_way() -> None:
    rig = Rig(local=local_source(always_five), governed=True)
    count(rig, 400, beside=True)
    assert rig.chains.report().remote_steps > 200


def test_remote_stages_may_join_while_rows_run() -> None:
    chains = ChainDrafter(local_source(always_five), clock=lambda: 0.0, thread=False)
    assert chains.propose([row([5, 6, 7], 1)]) == [[5, 5, 5, 5]]
    remote = remote_stage(ScriptedDrafter(count_on, vocab_size=VOCAB))
    chains.join(remote)
    assert remote.num_sessions == 1
    assert chains.propose([row([5, 6, 7, 8], 1)]) == [[5, 5, 5, 5]]


def test_a_local_drafter_that_fails_costs_its_row_guesses_and_no_other() -> None:
    def fail_for_nines(tokens: list[int], ask: Ask) -> TokenTree:
        if tokens[0] == 9:
            raise RuntimeError("nines")
        return count_on(tokens, ask)

    drafter = LocalDrafter("small", ScriptedDrafter(fail_for_nines, vocab_size=VOCAB), VOCAB, 16)
    chains = ChainDrafter(drafter, clock=lambda: 0.0, thread=False)
    assert chains.propose([row([9, 6, 7], 1), row([5, 6, 7], 1)]) == [[], [8, 9, 10, 11]]
    assert chains.propose([row([9, 6, 7, 8], 1), row([5, 6, 7, 8], 1)]) == [[], [9, 10, 11, 12]]
    assert (chains.report().wanted, chains.report().missing) == (4, 2)


def test_without_any_drafter_there_are_no_guesses() -> None:
    chains = ChainDrafter(None, thread=False)
    assert chains.propose([row([5, 6, 7], 1)]) == [[]]
    assert chains.report().stages == {}


def test_best_chain() -> None:
    tree = TokenTree.build([5, 7, 6, 8, 9], [-1, -1, 0, 0, 1], [0.5, 0.4, 0.1, 0.3, 0.4], stages=1)
    assert best_chain(tree, 4).tokens.tolist() == [5, 8]
    assert best_chain(tree, 1).tokens.tolist() == [5]
    assert len(best_chain(TokenTree.empty(), 4)) == 0


def measured(per_row: float, verifying: float = 0.0) -> StepTimes:
    times, rng = StepTimes(), np.random.default_rng(0)
    for _ in range(200):
        rows, drafts = int(rng.integers(1, 9)), int(rng.integers(0, 5)) * int(rng.integers(0, 9))
        seconds = 0.01 + per_row * (rows + drafts) + verifying * (drafts > 0)
        times.observe(rows, drafts, seconds * float(rng.uniform(0.97, 1.03)))
    return times


@pytest.mark.parametrize(("per_row", "verifying"), [(0.0, 0.0), (0.0004, 0.001), (0.003, 0.0)])
def test_step_times_are_learnt(per_row: float, verifying: float) -> None:
    times = measured(per_row, verifying)
    for rows, drafts in ((1, 0), (1, 4), (8, 0), (8, 32)):
        true = 0.01 + per_row * (rows + drafts) + verifying * (drafts > 0)
        assert times.seconds(rows, drafts) == pytest.approx(true, rel=0.08)


def alike(times: StepTimes, steps: int, seconds: float, noise: float = 0.03) -> list[float]:
    """So many steps of 8 rows without guesses. Returns what such a step was expected to take after each."""
    rng, expected = np.random.default_rng(0), []
    for _ in range(steps):
        times.observe(8, 0, seconds * float(rng.uniform(1 - noise, 1 + noise)))
        expected.append(times.seconds(8, 0))
    return expected


def test_steps_that_are_always_alike_neither_unsettle_what_is_known_nor_end_the_learning() -> None:
    times = StepTimes()
    late = alike(times, 3000, 0.02)[500:]
    assert late == pytest.approx([0.02] * len(late), rel=0.01)  # less than the noise of one step
    assert alike(times, 400, 0.028)[-1] == pytest.approx(0.028, rel=0.03)


def test_slow_steps_are_outliers_until_there_is_nothing_else() -> None:
    times = StepTimes()
    alike(times, 50, 0.02)
    for _ in range(20):
        alike(times, MOST_OUTLIERS - 1, 0.2)
        alike(times, 1, 0.02)
    assert times.seconds(8, 0) == pytest.approx(0.02, rel=0.03)
    assert alike(times, 500, 0.2)[-1] == pytest.approx(0.2, rel=0.03)


def test_chains_are_as_long_as_they_pay() -> None:
    chain = [0.9, 0.7, 0.4, 0.1, 0.02]
    assert ChainLengths(measured(0.0)).choose(1, [chain]) == [5]
    some = ChainLengths(measured(0.001)).choose(1, [chain])
    assert 2 <= some[0] <= 4
    assert ChainLengths(measured(0.02)).choose(8, [[0.3, 0.1]] * 8) == [0] * 8
    assert ChainLengths(measured(0.002)).choose(2, [[0.9, 0.8], [0.05, 0.01]])[1] == 0


def test_where_guesses_do_not_pay_they_are_tried_now_and_then() -> None:
    lengths = ChainLengths(measured(0.02, 0.01))
    tried = sum(lengths.choose(8, [[0.3]] * 8) != [0] * 8 for _ in range(4 * PROBE_STEPS))
    assert tried == 4


def test_everything_is_offered_until_costs_are_known() -> None:
    times = StepTimes()
    for _ in range(MIN_STEPS - 1):
        times.observe(1, 0, 0.02)
    assert ChainLengths(times).choose(1, [[0.5, 0.01]]) == [2]

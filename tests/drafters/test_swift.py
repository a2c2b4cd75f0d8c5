"""The layer-skipped target, on the target's own slots and on a rank of its own."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import GREEDY, SAMPLED, VOCAB, CountingRank, chain, continuation, random_tokens, tiny_rank

from cluster.core.errors import ConfigError
from cluster.core.types import SamplingParams
from drafters.base import Ask
from drafters.options import SwiftOptions
from drafters.swift import SwiftDrafter, parse_skip, uniform_skip

SKIP = [2, 5]


def swift_options(**options: object) -> SwiftOptions:
    return SwiftOptions.model_validate({"skip": SKIP, "max_upstream": 8, "prefill_chunk": 32, **options})


def own(rank: CountingRank, **options: object) -> SwiftDrafter:
    return SwiftDrafter(rank, swift_options(**options), max_len=100)


def colocated(rank: CountingRank, text: list[int], **options: object) -> tuple[SwiftDrafter, int]:
    """A drafter on a target that has emitted ``text``: all but the last token are committed in its slot."""
    slot = rank.kv.allocate()
    rank.forward([chain(slot, text[:-1], logits=False)])
    rank.kv.commit(slot, range(len(text) - 1))
    drafter = SwiftDrafter(rank, swift_options(**options), max_len=100, slot_of={"s": slot}.get)
    return drafter, slot


@pytest.mark.parametrize(("layers", "count"), [(30, 12), (30, 0), (30, 56), (30, 41), (4, 3), (3, 2), (2, 0)])
def test_uniform_skips_spread_over_the_inner_layers_half_attention_half_mlp(layers: int, count: int) -> None:
    skip = uniform_skip(layers, count)
    assert len(skip) == count
    assert all(2 <= sub_layer < 2 * layers - 2 for sub_layer in skip)
    attentions = sum(sub_layer % 2 == 0 for sub_layer in skip)
    assert attentions == (count + 1) // 2
    if count > 1:
        gaps = np.diff(sorted(sub_layer // 2 for sub_layer in skip))
        assert gaps.max() <= np.ceil((layers - 2) / count) + 1


def test_uniform_skips_take_attention_and_mlp_in_turn() -> None:
    assert uniform_skip(6, 4) == {2 * 1, 2 * 2 + 1, 2 * 3, 2 * 4 + 1}


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ("uniform:5", r"\[0, 4\]"),
        ("uniform", "uniform:COUNT"),
        ("best:2", "uniform:COUNT"),
        ([1, 8], r"\[8\]"),
        ([-1], "-1"),
    ],
)
def test_skips_the_model_does_not_have_are_refused(skip: str | list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_skip(skip, 4)


def test_skips_are_taken_as_listed_or_spread() -> None:
    assert parse_skip([7, 0, 7], 4) == {0, 7}
    assert parse_skip("uniform:2", 4) == uniform_skip(4, 2)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_skipping_nothing_guesses_what_the_target_says(params: SamplingParams) -> None:
    text = random_tokens(0, 15)
    said = continuation(tiny_rank(), text, params, 5)
    settings = {"skip": [], "children": 1, "passes": 6, "min_score": 0.0}
    beside, _ = colocated(tiny_rank(), text, **settings)
    alone = own(tiny_rank(), **settings)
    for drafter in (beside, alone):
        drafter.begin("s", text, params, len(text))
        assert drafter.propose([Ask("s", 5, 5)], {})["s"].tokens.tolist() == said


def test_colocated_it_reads_the_targets_cache_and_leaves_it_as_it_was() -> None:
    rank, text = tiny_rank(), random_tokens(1, 20)
    drafter, slot = colocated(rank, text, passes=3)
    drafter.begin("s", text, GREEDY, 20)
    rank.passes.clear()
    tree = drafter.propose([Ask("s", 8, 4)], {})["s"]
    tree.check(VOCAB, 8, 4)
    assert {skip for _, skip in rank.passes} == {frozenset(SKIP)}
    assert rank.passes[0][0] == 1
    assert rank.kv.length(slot) == 19
    assert rank.kv.num_free == 3
    # The verify step that follows sees nothing of the draft.
    verified = rank.forward([chain(slot, [text[-1], 3, 4])])
    untouched = tiny_rank()
    other = untouched.kv.allocate()
    untouched.forward([chain(other, text[:-1], logits=False)])
    untouched.kv.commit(other, range(19))
    assert verified.tolist() == untouched.forward([chain(other, [text[-1], 3, 4])]).tolist()
    drafter.end("s")
    assert rank.kv.num_free == 3


def test_colocated_it_follows_the_verifiers_commits() -> None:
    rank, text = tiny_rank(), random_tokens(2, 12)
    drafter, slot = colocated(rank, text)
    drafter.begin("s", text, SAMPLED, 12)
    for emitted in ([5], [6, 7, 8], random_tokens(3, 4)):
        drafter.propose([Ask("s", 6, 3)], {})
        rank.forward([chain(slot, [text[-1], *emitted[:-1]])])
        rank.kv.commit(slot, range(len(emitted)))
        drafter.commit("s", emitted)
        text = text + emitted
        fresh, _ = colocated(tiny_rank(), text)
        fresh.begin("s", text, SAMPLED, 12)
        expected = fresh.propose([Ask("s", 6, 3)], {})["s"]
        tree = drafter.propose([Ask("s", 6, 3)], {})["s"]
        assert (tree.tokens.tolist(), tree.parents.tolist()) == (expected.tokens.tolist(), expected.parents.tolist())


def test_colocated_it_waits_for_a_target_that_has_no_slot_or_has_not_read_the_prompt() -> None:
    rank, text = tiny_rank(), random_tokens(3, 12)
    drafter, _ = colocated(rank, text)
    drafter.begin("s", [*text, 1, 2], GREEDY, 12)
    drafter.begin("slotless", text, GREEDY, 12)
    rank.passes.clear()
    assert drafter.propose([Ask("s", 4, 4), Ask("slotless", 4, 4)], {}) == {}
    assert rank.passes == []


def test_colocated_it_refuses_more_rows_than_the_engine_has() -> None:
    with pytest.raises(ConfigError, match="max_upstream"):
        SwiftDrafter(tiny_rank(scratch=20), swift_options(), max_len=100, slot_of=dict[str, int]().get)


def test_on_its_own_rank_committed_tokens_run_through_all_layers_and_only_guesses_skip() -> None:
    rank, text = tiny_rank(), random_tokens(4, 15)
    drafter = own(rank, passes=2, children=1, min_score=0.0)
    drafter.begin("s", text, GREEDY, 15)
    tree = drafter.propose([Ask("s", 3, 3)], {})["s"]
    assert rank.passes == [(15, frozenset()), (1, frozenset(SKIP)), (1, frozenset(SKIP))]
    assert int(tree.tokens[0]) == continuation(tiny_rank(), text, GREEDY, 1)[0]
    rank.passes.clear()
    drafter.commit("s", [*tree.tokens[:2].tolist(), 9])
    drafter.propose([Ask("s", 1, 1)], {})
    assert rank.passes == [(3, frozenset())]


def test_on_its_own_rank_drafts_after_random_commits_equal_those_of_a_fresh_session() -> None:
    rng = np.random.default_rng(0)
    rank, text = tiny_rank(), random_tokens(5, 12)
    drafter = own(rank)
    drafter.begin("s", text, SAMPLED, 12)
    while len(text) < 80:
        ask = Ask("s", int(rng.integers(1, 12)), int(rng.integers(1, 5)))
        tree = drafter.propose([ask], {})["s"]
        fresh = own(tiny_rank(), prefill_chunk=90, max_upstream=0)
        fresh.begin("s", text, SAMPLED, 12)
        expected = fresh.propose([ask], {})["s"]
        assert (tree.tokens.tolist(), tree.parents.tolist()) == (expected.tokens.tolist(), expected.parents.tolist())
        assert tree.scores == pytest.approx(expected.scores, rel=1e-5)
        path = [int(tree.tokens[node]) for node in tree.path(int(rng.integers(-1, len(tree))))]
        emitted = [*path, int(rng.integers(0, VOCAB))]
        drafter.commit("s", emitted)
        text = text + emitted
    drafter.end("s")
    rank.kv.check()
    assert rank.kv.num_free == 4

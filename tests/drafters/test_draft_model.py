"""A model drafter's K/V follows the commits, and its trees are what the model itself says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import GREEDY, SAMPLED, VOCAB, CountingRank, chain, continuation, random_tokens, tiny_rank

from cluster.core.errors import Overloaded, UnknownSession
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin, SamplingParams
from drafters.base import Ask
from drafters.draft_model import ModelDrafter, OwnSlots
from drafters.options import GrowthOptions

MAX_LEN = 100


def model_drafter(rank: CountingRank, max_len: int = MAX_LEN, **options: float) -> ModelDrafter:
    settings = GrowthOptions.model_validate({"prefill_chunk": 32, **options})
    return ModelDrafter(rank, OwnSlots(rank.kv, settings.prefill_chunk), settings, max_len=max_len)


def ready(drafter: ModelDrafter, session: str, tokens: list[int], params: SamplingParams = GREEDY) -> None:
    """Begin a session and let its prompt be read."""
    drafter.begin(session, tokens, params, len(tokens))
    while session not in drafter.propose([Ask(session, 1, 1)], {}):
        pass


def assert_equal(left: TokenTree, right: TokenTree) -> None:
    assert left.tokens.tolist() == right.tokens.tolist()
    assert left.parents.tolist() == right.parents.tolist()
    assert left.stages.tolist() == right.stages.tolist()
    assert left.scores == pytest.approx(right.scores, rel=1e-5)


def random_tree(rng: np.random.Generator, size: int) -> TokenTree:
    parents = [int(rng.integers(-1, node)) if node else -1 for node in range(size)]
    return TokenTree.build(rng.integers(0, VOCAB, size), parents, stages=int(Origin.SMALL))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_after_random_commits_drafts_equal_those_of_a_session_begun_afresh(params: SamplingParams) -> None:
    rng = np.random.default_rng(1)
    rank, text = tiny_rank(), random_tokens(0, 20)
    drafter = model_drafter(rank, min_score=0.0)
    ready(drafter, "s", text, params)
    for _ in range(25):
        ask = Ask("s", int(rng.integers(1, 16)), int(rng.integers(1, 7)))
        hints = {"s": random_tree(rng, int(rng.integers(0, 6)))}
        tree = drafter.propose([ask], hints)["s"]
        tree.check(VOCAB, ask.max_nodes, ask.max_depth)
        fresh = model_drafter(tiny_rank(), min_score=0.0)
        ready(fresh, "s", text, params)
        assert_equal(tree, fresh.propose([ask], hints)["s"])
        if rng.random() < 0.2:
            continue  # asked again without a commit in between
        path = [int(tree.tokens[node]) for node in tree.path(int(rng.integers(-1, len(tree))))]
        emitted = [*path, int(rng.integers(0, VOCAB))] if rng.random() < 0.8 else random_tokens(len(text), 3)
        drafter.commit("s", emitted)
        text = text + emitted
        rank.kv.check()
        if len(text) > MAX_LEN - 12:
            text = text[: 20 + int(rng.integers(0, 20))]
            ready(drafter, "s", text, params)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.6, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 9, "min_p": 0.02},
        {"temperature": 0.0, "repetition_penalty": 1.8, "frequency_penalty": 1.0},
        {"temperature": 0.8, "presence_penalty": 2.0, "logit_bias": ((4, 3.0), (7, -100.0), (10_000, 5.0))},
    ],
    ids=str,
)
def test_the_target_as_its_own_draft_guesses_every_token(sampling: dict[str, Any]) -> None:
    for seed in range(4):
        params = SamplingParams(seed=seed, **sampling)
        text = random_tokens(seed, 12)
        drafter = model_drafter(tiny_rank(), children=1, passes=8, min_score=0.0)
        ready(drafter, "s", text, params)
        tree = drafter.propose([Ask("s", 6, 6)], {})["s"]
        said = continuation(tiny_rank(), text, params, 6)
        assert tree.tokens.tolist() == said
        drafter.commit("s", said)
        again = drafter.propose([Ask("s", 3, 3)], {})["s"]
        assert again.tokens.tolist() == continuation(tiny_rank(), text, params, 9)[6:]


def test_a_batch_of_sessions_gives_each_the_tree_it_gets_alone() -> None:
    texts = {name: random_tokens(seed, 5 + 7 * seed) for seed, name in enumerate("abc")}
    params = {"a": GREEDY, "b": SAMPLED, "c": SamplingParams(temperature=0.7, seed=8)}
    together = model_drafter(tiny_rank())
    for name, text in texts.items():
        ready(together, name, text, params[name])
    asks = [Ask("a", 12, 4), Ask("b", 3, 9), Ask("c", 20, 2)]
    hints = {"b": random_tree(np.random.default_rng(0), 5)}
    trees = together.propose(asks, hints)
    for ask in asks:
        alone = model_drafter(tiny_rank())
        ready(alone, ask.session_id, texts[ask.session_id], params[ask.session_id])
        assert_equal(trees[ask.session_id], alone.propose([ask], hints)[ask.session_id])


def test_a_batch_costs_one_forward_per_pass() -> None:
    rank = tiny_rank()
    drafter = model_drafter(rank, passes=3, min_score=0.0)
    for seed, name in enumerate("abc"):
        ready(drafter, name, random_tokens(seed, 10))
    rank.passes.clear()
    drafter.propose([Ask(name, 30, 10) for name in "abc"], {})
    assert len(rank.passes) == 3


def test_scores_are_products_of_estimates_along_the_path() -> None:
    text = random_tokens(3, 8)
    drafter = model_drafter(tiny_rank(), children=2, passes=2, expand_per_pass=1)
    ready(drafter, "s", text)
    tree = drafter.propose([Ask("s", 9, 9)], {})["s"]
    rank = tiny_rank()
    slot = rank.kv.allocate()
    for node in range(len(tree)):
        path = [int(tree.tokens[step]) for step in tree.path(node)]
        logits = rank.forward([chain(slot, [*text, *path[:-1]])]).double()
        expected = 1.0
        for step, token in enumerate(path):
            best = torch.topk(logits[len(text) - 1 + step], 64)
            expected *= float(torch.softmax(best.values, 0)[best.indices == token])
        assert tree.scores[node] == pytest.approx(expected, rel=1e-4)


def test_upstream_nodes_carry_the_walk_further_in_the_same_pass_and_keep_their_colour() -> None:
    text = random_tokens(4, 10)
    said = continuation(tiny_rank(), text, GREEDY, 5)
    drafter = model_drafter(tiny_rank(), passes=1, children=1)
    ready(drafter, "s", text)
    alone = drafter.propose([Ask("s", 9, 9)], {})["s"]
    assert alone.tokens.tolist() == said[:1]
    helped = drafter.propose([Ask("s", 9, 9)], {"s": TokenTree.chain(said[:4], int(Origin.SMALL))})["s"]
    assert helped.tokens.tolist() == said
    assert helped.stages.tolist() == [Origin.SMALL] * 4 + [Origin.MEDIUM]


def test_upstream_guesses_the_model_rules_out_leave_no_trace() -> None:
    text = random_tokens(4, 10)
    drafter = model_drafter(tiny_rank(), passes=1, children=2)
    strict = SamplingParams(temperature=1.0, top_k=2, seed=1)
    ready(drafter, "s", text, strict)
    alone = drafter.propose([Ask("s", 9, 9)], {})["s"]
    wrong = next(token for token in range(VOCAB) if token not in alone.tokens)
    misled = drafter.propose([Ask("s", 9, 9)], {"s": TokenTree.chain([wrong, wrong], int(Origin.SMALL))})["s"]
    assert_equal(misled, alone)


def test_accepted_guesses_are_not_computed_again() -> None:
    rank, text = tiny_rank(), random_tokens(5, 10)
    drafter = model_drafter(rank, passes=4, children=1, min_score=0.0)
    ready(drafter, "s", text)
    tree = drafter.propose([Ask("s", 4, 4)], {})["s"]
    drafter.commit("s", [*tree.tokens[:2].tolist(), 1])
    rank.passes.clear()
    drafter.propose([Ask("s", 1, 1)], {})
    assert [rows for rows, _ in rank.passes] == [1]


def test_a_long_prompt_is_read_in_chunks_beside_the_other_sessions() -> None:
    rank = tiny_rank()
    drafter = model_drafter(rank)
    ready(drafter, "short", random_tokens(6, 5))
    drafter.begin("long", random_tokens(7, 80), GREEDY, 80)
    answered = [set(drafter.propose([Ask("short", 2, 1), Ask("long", 2, 1)], {})) for _ in range(3)]
    assert answered == [{"short"}, {"short"}, {"short", "long"}]
    assert max(rows for rows, _ in rank.passes) <= 32 + 1


@pytest.mark.parametrize(("length", "depth"), [(97, 4), (99, 2), (100, 1), (101, None)])
def test_the_models_context_bounds_the_depth_and_a_longer_session_gets_nothing(length: int, depth: int | None) -> None:
    drafter = model_drafter(tiny_rank(capacity=MAX_LEN), children=1, passes=9, min_score=0.0)
    drafter.begin("s", random_tokens(8, length), GREEDY, length)
    for _ in range(5):
        trees = drafter.propose([Ask("s", 30, 30)], {})
    if depth is None:
        assert trees == {}
        drafter.commit("s", [1, 2])
    else:
        assert trees["s"].depths().max() == depth


def test_begin_on_a_held_session_replaces_it_and_keeps_the_shared_prefix() -> None:
    rank, text = tiny_rank(), random_tokens(9, 30)
    drafter = model_drafter(rank)
    ready(drafter, "s", text)
    drafter.commit("s", [1, 2, 3])
    drafter.propose([Ask("s", 4, 4)], {})
    other = [*text[:25], 7, 7, 7]
    rank.passes.clear()
    drafter.begin("s", other, SAMPLED, 25)
    tree = drafter.propose([Ask("s", 4, 1)], {})["s"]
    assert rank.passes[0][0] == 3
    fresh = model_drafter(tiny_rank())
    ready(fresh, "s", other, SAMPLED)
    assert_equal(tree, fresh.propose([Ask("s", 4, 1)], {})["s"])
    rank.kv.check()
    assert rank.kv.num_free == 3


def test_no_slot_leaks_and_one_session_too_many_is_refused() -> None:
    rank = tiny_rank(num_slots=2)
    drafter = model_drafter(rank)
    ready(drafter, "a", [1, 2, 3])
    ready(drafter, "b", [4, 5])
    with pytest.raises(Overloaded):
        drafter.begin("c", [1], GREEDY, 1)
    drafter.propose([Ask("a", 4, 4)], {})
    drafter.end("a")
    drafter.end("a")
    ready(drafter, "c", [1])
    for name in "bc":
        drafter.end(name)
    rank.kv.check()
    assert rank.kv.num_free == 2


def test_unknown_sessions_are_named_before_any_work_is_done() -> None:
    rank = tiny_rank()
    drafter = model_drafter(rank)
    drafter.begin("known", [1], GREEDY, 1)
    drafter.end("s")
    with pytest.raises(UnknownSession, match="'s'"):
        drafter.propose([Ask("known", 1, 1), Ask("s", 1, 1)], {})
    with pytest.raises(UnknownSession, match="'s'"):
        drafter.commit("s", [1])
    assert rank.passes == []


@pytest.mark.parametrize(
    "hint",
    [
        TokenTree.chain([VOCAB], 1),
        TokenTree.build([1, 2], [1, 0], stages=1),
        TokenTree.build([5] * 9, [-1, -1, -1, 0, 1, 2, 3, 4, 5], stages=1),
        TokenTree.chain([1] * 200, 1),
    ],
    ids=["token", "parent", "duplicates", "over-deep"],
)
def test_rubbish_from_upstream_costs_nothing_but_time(hint: TokenTree) -> None:
    drafter = model_drafter(tiny_rank())
    ready(drafter, "s", random_tokens(1, 9))
    tree = drafter.propose([Ask("s", 6, 3)], {"s": hint})["s"]
    tree.check(VOCAB, 6, 3)
    assert len(tree) > 0


def test_a_forward_that_fails_leaves_the_session_as_it_was() -> None:
    rank, text = tiny_rank(), random_tokens(1, 9)
    drafter = model_drafter(rank)
    ready(drafter, "s", text)
    before = drafter.propose([Ask("s", 6, 3)], {})["s"]
    whole = rank.forward

    def failing(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("no memory")

    rank.forward = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        drafter.propose([Ask("s", 6, 3)], {})
    rank.forward = whole  # type: ignore[method-assign]
    assert_equal(drafter.propose([Ask("s", 6, 3)], {})["s"], before)

"""Staged: where small is right medium needs one pass; where small is wrong, empty or dead nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from tiny_models import GREEDY, SAMPLED, VOCAB, continuation, random_tokens, tiny_rank

from cluster.core.errors import UnknownSession
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin, SamplingParams
from drafters.base import Ask
from drafters.draft_model import ModelDrafter, OwnSlots
from drafters.growth import ROOT, Growth
from drafters.options import GrowthOptions, SssdOptions
from drafters.sssd import SssdDrafter
from drafters.staged import StagedDrafter, fill_in

OPTIONS = GrowthOptions(prefill_chunk=32, passes=6, min_score=0.0)


class ScriptedSmall:
    """Guesses by a function; ``broken`` names the methods that raise."""

    stage = Origin.SMALL
    vocab_size: int | None = None

    def __init__(self, guess: Callable[[Ask], TokenTree], broken: frozenset[str] = frozenset()) -> None:
        self.guess = guess
        self.broken = broken
        self.ended: list[str] = []
        self.owners: list[str] = []

    def _call(self, method: str) -> None:
        if method in self.broken:
            raise RuntimeError(f"{method} is broken")

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        self._call("begin")
        self.owners.append(owner)

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        self._call("propose")
        return {ask.session_id: self.guess(ask) for ask in asks}

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        self._call("commit")

    def end(self, session_id: str) -> None:
        self.ended.append(session_id)


def medium() -> ModelDrafter:
    rank = tiny_rank()
    return ModelDrafter(rank, OwnSlots(rank.kv, OPTIONS.prefill_chunk), OPTIONS, max_len=100)


def passes_of(drafter: ModelDrafter) -> list[tuple[int, frozenset[int]]]:
    return drafter._rank.passes  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_with_a_perfect_small_stage_medium_needs_one_pass(params: SamplingParams) -> None:
    text = random_tokens(0, 10)
    said = continuation(tiny_rank(), text, params, 6)
    alone, helped = medium(), medium()
    staged = StagedDrafter(ScriptedSmall(lambda ask: TokenTree.chain(said, int(Origin.SMALL))), helped)
    for drafter in (alone, staged):
        drafter.begin("s", text, params, 10)
    without = alone.propose([Ask("s", 40, 6)], {})["s"]
    tree = staged.propose([Ask("s", 40, 6)], {})["s"]
    assert len(passes_of(alone)) > 3
    assert len(passes_of(helped)) == 1
    node = -1
    for token in said:
        found = tree.child(node, token)
        assert found is not None
        node = found
        assert tree.stages[node] == Origin.SMALL
    assert without.child(-1, said[0]) is not None


@pytest.mark.parametrize("broken", ["begin", "propose", "commit"])
def test_a_failing_small_stage_does_not_matter(broken: str) -> None:
    text = random_tokens(1, 10)
    small = ScriptedSmall(lambda ask: TokenTree.chain([1], 1), frozenset({broken}))
    staged, alone = StagedDrafter(small, medium()), medium()
    for drafter in (staged, alone):
        drafter.begin("s", text, GREEDY, 10)
        drafter.propose([Ask("s", 8, 4)], {})
        drafter.commit("s", [3, 4])
    tree, expected = (each.propose([Ask("s", 8, 4)], {})["s"] for each in (staged, alone))
    if broken == "propose":
        assert tree.tokens.tolist() == expected.tokens.tolist()
    tree.check(VOCAB, 8, 4)
    staged.end("s")
    assert small.ended == ["s"]


@pytest.mark.parametrize(
    "rubbish", [TokenTree.empty(), TokenTree.chain([VOCAB + 5], 1), TokenTree.build([1, 2], [1, 0])]
)
def test_an_empty_or_malformed_small_tree_does_not_matter(rubbish: TokenTree) -> None:
    text = random_tokens(1, 10)
    staged, alone = StagedDrafter(ScriptedSmall(lambda ask: rubbish), medium()), medium()
    for drafter in (staged, alone):
        drafter.begin("s", text, GREEDY, 10)
    tree, expected = (each.propose([Ask("s", 8, 4)], {})["s"] for each in (staged, alone))
    assert tree.tokens.tolist() == expected.tokens.tolist()
    assert tree.scores.tolist() == expected.scores.tolist()


def test_while_medium_reads_a_long_prompt_small_answers_within_the_budget() -> None:
    text = [1, 2, 3, 4, 5] * 18
    staged = StagedDrafter(SssdDrafter(SssdOptions()), medium())
    staged.begin("s", text, GREEDY, 90)
    first = staged.propose([Ask("s", 3, 2)], {})["s"]
    first.check(VOCAB, 3, 2)
    assert first.tokens.tolist()[0] == 1
    assert set(first.stages.tolist()) == {Origin.SMALL}
    for _ in range(2):
        later = staged.propose([Ask("s", 3, 2)], {})["s"]
    assert Origin.MEDIUM in later.stages.tolist() or len(later) == 3


def test_small_guesses_more_than_the_budget_for_medium_to_check() -> None:
    asked: list[Ask] = []

    def guess(ask: Ask) -> TokenTree:
        asked.append(ask)
        return TokenTree.empty()

    staged = StagedDrafter(ScriptedSmall(guess), medium(), small_nodes=16)
    staged.begin("s", [1, 2, 3], GREEDY, 3)
    for budget in (2, 30):
        assert len(staged.propose([Ask("s", budget, 5)], {})["s"]) <= budget
    assert [ask.max_nodes for ask in asked] == [16, 30]


def test_fill_in_takes_mediums_tree_where_there_is_one() -> None:
    small = {"a": TokenTree.chain([1, 2, 3], 1), "b": TokenTree.chain([4, 5, 6], 1)}
    filled = fill_in([Ask("a", 2, 9), Ask("b", 9, 1), Ask("c", 9, 9)], small, {"a": TokenTree.chain([7], 2)})
    assert {name: tree.tokens.tolist() for name, tree in filled.items()} == {"a": [7], "b": [4]}


def test_an_unknown_session_is_mediums_error() -> None:
    staged = StagedDrafter(SssdDrafter(SssdOptions()), medium())
    with pytest.raises(UnknownSession):
        staged.propose([Ask("s", 1, 1)], {})
    with pytest.raises(UnknownSession):
        staged.commit("s", [1])
    staged.end("s")


def test_small_learns_whose_session_it_is() -> None:
    small = ScriptedSmall(lambda ask: TokenTree.empty())
    StagedDrafter(small, medium()).begin("s", [1, 2, 3], GREEDY, 3, "me")
    assert small.owners == ["me"]


@pytest.mark.parametrize(("keeps", "expected"), [(True, {1: 0.9, 2: 0.8, 5: 0.6}), (False, {1: 0.1, 5: 0.6})])
def test_upstreams_scores_stand_where_a_model_may_know_less(keeps: bool, expected: dict[int, float]) -> None:
    upstream = TokenTree.build([1, 2], [-1, 0], [0.9, 0.8])
    growth = Growth(8, 4, upstream, GrowthOptions(keep_scores=keeps, children=1), Origin.MEDIUM)
    growth.expand(ROOT, np.array([5, 1]), np.array([0.6, 0.1]))
    tree = growth.tree()
    assert dict(zip(tree.tokens.tolist(), tree.scores.tolist())) == pytest.approx(expected)

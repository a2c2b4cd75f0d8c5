"""Coupled against uncoupled drafting: rounds as an engine would count them, on scripted trees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from fakes import ScriptedDrafter

from benchmarks.coupling import KINDS, UNCOUPLED, TwoWalks, Walk, read_records, summarise
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from drafters.base import Ask

ANSWER = [5, 6, 7, 8, 9]


def test_a_round_ends_with_the_first_token_its_tree_does_not_hold() -> None:
    walk = Walk()
    walk.advance(5)
    walk.begin_round(TokenTree.build([3, 6, 7], [-1, -1, 1]))
    for token in (6, 7):
        walk.advance(token)
        assert walk.tree is not None
    walk.advance(8)
    assert walk.tree is None
    walk.begin_round(TokenTree.chain([4, 9]))
    walk.advance(9)
    assert (walk.rounds, walk.tokens) == ([0, 2, 0], 5)


class Recording(ScriptedDrafter):
    """Knows the answer where it shares the target's noise; notes what it is asked, and how it is told to sample."""

    def __init__(self) -> None:
        super().__init__(self._guess)
        self.asked: list[tuple[str, int]] = []
        self.temperatures: dict[str, float] = {}

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        super().begin(session_id, token_ids, params, prompt_len, owner)
        self.temperatures[session_id] = params.temperature

    def _guess(self, tokens: list[int], ask: Ask) -> TokenTree:
        at = len(tokens) - 1
        self.asked.append((ask.session_id, at))
        return TokenTree.chain(ANSWER[at : at + 2] if not ask.session_id.endswith(UNCOUPLED) else [99])


def test_each_kind_goes_through_the_same_answer_in_rounds_of_its_own_and_the_target_sees_no_tree() -> None:
    inner = Recording()
    both = TwoWalks(inner)
    both.begin("r#1", [1], SamplingParams(temperature=1.0), 1)
    assert inner.temperatures == {"r#1": 1.0, "r#1" + UNCOUPLED: 0.0}
    for token in ANSWER:
        assert both.propose([Ask("r#1", 16, 8)], {}) == {}
        both.commit("r#1", [token])
    both.end("r#1")
    assert {kind: walk.rounds for kind, walk in both.walks["r"].items()} == {
        "coupled": [2, 2],
        "uncoupled": [0, 0, 0, 0, 0],
    }
    assert [at for name, at in inner.asked if not name.endswith(UNCOUPLED)] == [0, 3]
    assert inner.tokens == {}


def test_the_ratio_is_of_tokens_by_rounds_and_its_interval_of_prompts() -> None:
    two = {"id": "0", "category": "a", "tokens": 6, "coupled": [2, 2], "uncoupled": [1, 0, 0, 1]}
    one = {"id": "1", "category": "b", "tokens": 4, "coupled": [1, 1], "uncoupled": [1, 1]}
    summary = summarise([two, one])
    assert summary["accepted_length"] == {"coupled": 2.5, "uncoupled": pytest.approx(10 / 6, abs=1e-4)}
    assert summary["ratio"] == 1.5
    assert summary["interval"] == [1.0, 2.0]
    assert summary["share_of_rounds_reaching_depth"]["coupled"] == [1.0, 0.5]
    assert summary["accepted_length_by_category"]["a"] == dict(zip(KINDS, (3.0, 1.5)))


def test_records_are_taken_up_again_and_never_mixed_with_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    assert read_records(path, {"nodes": 16}) == []
    with path.open("a") as log:
        log.write(json.dumps({"id": "0"}) + "\n")
    assert read_records(path, {"nodes": 16}) == [{"id": "0"}]
    with pytest.raises(SystemExit, match="other settings"):
        read_records(path, {"nodes": 8})

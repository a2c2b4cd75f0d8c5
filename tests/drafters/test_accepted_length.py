"""The replay counts as a real run would: accepted tokens follow the tree, each round adds its bonus token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.accepted_length import (
    Record,
    followed,
    main,
    measure_live,
    read_records,
    reliability,
    replay,
    truncated,
)
from cluster.core.token_tree import TokenTree
from drafters.datastore import TEXT, Datastore, StoreHeader, join
from drafters.options import SssdOptions
from drafters.sssd import SssdDrafter


def test_a_record_is_followed_as_far_as_the_tree_goes() -> None:
    tree = TokenTree.build([5, 7, 6, 8, 9], [-1, -1, 0, 0, 1])
    assert followed(tree, [5, 8, 3]) == [0, 3]
    assert followed(tree, [7, 9]) == [1, 4]
    assert followed(tree, [6]) == []


def test_rounds_and_tokens_of_a_repetition_are_those_counted_by_hand() -> None:

    record = Record("all", [1, 2, 3, 4], [1, 2, 3, 4, 9])
    tally = replay([record], SssdDrafter(SssdOptions(store=None)), 8)
    # Nothing follows 4 yet: a round for 1. Then 2 3 4 are accepted and 9 is the bonus.
    assert (tally.tokens["all"], tally.rounds["all"]) == (5, 2)
    assert tally.length() == 2.5


def test_the_last_token_of_a_record_is_never_drafted() -> None:
    record = Record("all", [1, 2, 3, 1], [2, 3])
    tally = replay([record], SssdDrafter(SssdOptions(store=None)), 8)
    assert (tally.tokens["all"], tally.rounds["all"]) == (2, 1)


def test_without_its_own_text_a_session_is_guessed_for_from_the_store_alone() -> None:
    record = Record("all", [1, 2, 3, 4, 1], [2, 3, 4])
    silent = replay([record], SssdDrafter(SssdOptions(store=None)), 8, own=False)
    assert silent.length() == 1.0
    store = Datastore.of([[1, 2, 3, 4]], 10)
    assert replay([record], SssdDrafter(SssdOptions(store=None), store=store), 8, own=False).length() == 3.0


def test_a_store_is_cut_between_documents() -> None:
    store = Datastore.of([[1, 2], [3, 4], [5, 6]], 10)
    assert truncated(store, 8).text.tolist() == [1, 2, 10, 3, 4, 10]
    assert len(truncated(store, 2)) == 0


def test_the_command_reports_every_source_and_ends_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs, prompts, store = tmp_path / "out.jsonl", tmp_path / "prompts.jsonl", tmp_path / "store"
    lines = [{"id": "1-x", "prompt_token_ids": [1, 2], "token_ids": [3, 1, 2, 3]}]
    outputs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts.write_text('{"category": "qa"}\n{"category": "math"}\n')
    assert read_records(outputs, prompts, None) == [Record("math", [1, 2], [3, 1, 2, 3])]
    store.mkdir()
    text = join([[1, 2, 3], [3, 1]], 10)
    text.tofile(store / TEXT)
    StoreHeader(10, "t", len(text), 2, "test-accepted-length").write(store)
    flags = ["--outputs", str(outputs), "--prompts", str(prompts), "--store", str(store), "--nodes", "2,4"]
    assert main([*flags, "--store-tokens", "4"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    seen = [(row["source"], row["store_tokens"], row["nodes"]) for row in result["rows"]]
    assert seen == [(s, n, k) for s, n in (("own", 0), ("both", 4), ("store", 7), ("both", 7)) for k in (2, 4)]
    assert set(result["rows"][0]["by_category"]) == {"math"}


def test_an_empty_store_that_fills_is_of_use_to_later_records() -> None:
    answers = [[5, 6, 7, 8, 9, 3, 4] * 200, [5, 6, 7, 8, 9, 3, 4] * 200] * 4
    records = [Record("all", [100 + index, 5], answer[1:]) for index, answer in enumerate(answers)]
    (row,) = measure_live(records, None, [8])
    sizes = [size for size, _ in row["by_part"]]
    assert sizes[0] == 0
    assert sizes == sorted(sizes)
    assert sizes[-1] > 4096
    assert row["by_part"][-1][1] > row["by_part"][0][1]


def test_reliability_sets_scores_beside_hits() -> None:
    tally = replay([Record("all", [1, 2, 1], [2, 1, 2, 1])], SssdDrafter(SssdOptions(store=None)), 4)
    for score, hits in reliability(tally):
        assert 0.0 <= score <= 1.0
        assert 0.0 <= hits <= 1.0

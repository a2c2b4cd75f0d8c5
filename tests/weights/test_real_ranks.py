"""The embedded default's real weights over three ranks, as offline users run them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import offline

pytestmark = [pytest.mark.weights, pytest.mark.slow, pytest.mark.timeout(1500)]

PROMPTS = Path(__file__).with_name("prompts.jsonl")


def generated(out: Path, *flags: str) -> dict[str, list[int]]:
    common = ["--prompts", str(PROMPTS), "--dtype", "float32", "--max-tokens", "32", "--limit", "8"]
    assert offline.main([*common, "--concurrency", "8", "--threads", "1", "--out", str(out), *flags]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 8
    return {record["id"]: record["token_ids"] for record in records}


@pytest.mark.parametrize("drafters", ["none", "staged"])
def test_three_ranks_give_one_ranks_tokens_in_fp32(tmp_path: Path, drafters: str) -> None:
    one = generated(tmp_path / "one", "--drafters", "none")
    flags = ("--drafters", drafters, "--medium", "swift", "--tensor-parallel-size", "3")
    assert generated(tmp_path / "three", *flags) == one


def test_two_ranks_are_refused_with_the_sizes_that_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert offline.main(["--prompts", str(PROMPTS), "--tensor-parallel-size", "2"]) == 2
    assert "9 attention heads and 3 KV heads evenly; allowed for this model: 1, 3, 9" in capsys.readouterr().err

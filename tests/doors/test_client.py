"""The terminal client against the service: what it prints, and how it fails."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from doors.conftest import Doors, byte_tokenizer
from doors.fake_engine import text_of

from deployments.client import Painter, main
from protos import generation_pb2 as pb

ASK = ["--prompt", "hello", "--max-tokens", "9", "--raw"]


@pytest.mark.cluster
@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_the_client_prints_the_answer_and_a_summary(
    doors: Doors, stream: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--address", doors.address, *ASK, *stream, "--compare"]) == 0
    out = capsys.readouterr().out
    answer = doors.stub.Generate(
        pb.GenerateRequest(prompt="hello", sampling_params=pb.SamplingParams(max_tokens=9, seed=0))
    )
    assert answer.text == "".join(map(text_of, answer.token_ids))
    assert out.startswith(f"{answer.text}\n")
    assert "9 tokens" in out
    assert "3 rounds, 3.00 tokens a round, 6 of 12 drafted accepted; small 3, medium 3, target 3" in out
    assert "the same 9 tokens" in out


@pytest.mark.cluster
def test_a_refused_request_is_one_line_on_stderr(doors: Doors, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--address", doors.address, "--prompt", "x", "--max-tokens", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: INVALID_ARGUMENT: max_tokens: ")


@pytest.mark.cluster
def test_another_vocabulary_is_told_and_shown_without_colours(
    doors: Doors, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(tokenizer_folder, tmp_path / "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    options = ["--color", "always", "--tokenizer", str(other)]
    assert main(["--address", doors.address, *ASK, *options]) == 0
    assert "vocabulary" in capsys.readouterr().err


def test_an_unknown_stage_is_refused_before_anything_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASK, "--stages", "small,large", "--address", "127.0.0.1:1"]) == 2
    assert "'large'" in capsys.readouterr().err


def test_each_token_has_its_origins_colour_and_a_split_character_waits(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer()
    painter = Painter(True, tokenizer.backend_tokenizer)
    ids = tokenizer.encode("aé")
    assert len(ids) == 3
    painter.show("", ids[:2], [pb.ORIGIN_SMALL, pb.ORIGIN_MEDIUM])
    painter.show("aé", ids[2:], [pb.ORIGIN_TARGET])
    assert capsys.readouterr().out == "\x1b[32ma\x1b[0m\x1b[36mé\x1b[0m"

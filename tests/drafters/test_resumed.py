"""Chats that a target writes, and a search in them, go on with what they wrote themselves and with nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import save_tiny_llama
from tiny_models import GREEDY, continuation, save_target
from transformers import AutoTokenizer

from cluster.core.errors import ConfigError
from cluster.engine.rank import build_rank
from drafters.training import search_skip, self_generate
from drafters.training.claims import write_whole
from drafters.training.teacher import read_pieces

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_speaker(folder: Path, seed: int = 0) -> Path:
    save_target(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    save_tiny_llama(folder, seed=seed)
    return folder


def generate(model: Path, out: Path, tokens: int, *more: str) -> None:
    common = ["--dtype", "float32", "--threads", "1", "--slots", "2", "--max-turns", "1", "--user-tokens", "4"]
    args = ["--model", str(model), "--out", str(out), "--tokens", str(tokens), "--reply-tokens", "6", *common, *more]
    assert self_generate.main(args) == 0


def test_a_file_of_another_models_or_settings_chats_is_not_gone_on_with(tmp_path: Path) -> None:
    model, out = save_speaker(tmp_path / "model"), tmp_path / "chats.jsonl"
    generate(model, out, 30)
    begun = out.read_text()
    generate(model, out, 60, "--threads", "2", "--slots", "3")  # what no chat depends on
    assert out.read_text().startswith(begun)
    assert len(out.read_text()) > len(begun)
    with pytest.raises(ConfigError, match=r"--out: .*chats.jsonl holds a run of another model; allowed"):
        generate(save_speaker(tmp_path / "other", seed=1), out, 90)
    with pytest.raises(ConfigError, match="another max_turns and seed"):
        generate(model, out, 90, "--max-turns", "2", "--seed", "5")
    (tmp_path / "chats.jsonl.run.json").unlink()
    with pytest.raises(ConfigError, match=r"no chats.jsonl.run.json says whose"):
        generate(model, out, 90)
    out.unlink()
    generate(model, out, 30, "--seed", "5")
    out.unlink()
    generate(model, out, 30)  # the note of a file that is gone binds nobody


def test_a_chat_without_replies_is_not_made_again(tmp_path: Path) -> None:
    path, asked = tmp_path / "chats.jsonl", []

    def write(indices: Iterator[int]) -> Iterator[SimpleNamespace]:
        for index in indices:
            asked.append(index)
            yield SimpleNamespace(index=index, text=[5, 6, 7], replies=[] if index % 2 == 0 else [[1, 3]])

    for wanted in (3, 6):
        done, tokens = self_generate.written_before(path)
        with path.open("a") as out:
            self_generate.run(SimpleNamespace(write=write), out, done, tokens, wanted)  # type: ignore[arg-type]
    assert asked == [0, 1, 2, 3]
    assert self_generate.written_before(path) == ({0, 1, 2, 3}, 6)
    assert [piece.tokens for piece in read_pieces([path], 64, None)] == [[5, 6, 7], [5, 6, 7]]


def write_replies(path: Path, model: Path, starts: tuple[int, ...]) -> Path:
    rank = build_rank(model, "float32", num_slots=1, capacity=96, scratch=96, kernels="torch", threads=1)
    with path.open("w") as file:
        for start in starts:
            said = continuation(rank, [start, 9], GREEDY, search_skip.SHORTEST)  # type: ignore[arg-type]
            file.write(json.dumps({"token_ids": [start, 9, *said], "replies": [[2, 2 + len(said)]]}) + "\n")
    return path


def test_a_search_goes_on_with_its_own_state_alone(tmp_path: Path) -> None:
    model, out = save_target(tmp_path / "model"), tmp_path / "sets"
    chats = write_replies(tmp_path / "chats.jsonl", model, (5, 7))
    common = ["--dtype", "float32", "--threads", "1", "--texts", "1", "--held-out", "1", "--longest", "80"]
    common += ["--count", "2", "--window", "32", "--out", str(out)]

    def search(model: Path, chats: Path, trials: int) -> int:
        search_skip.main(["--model", str(model), "--chats", str(chats), "--trials", str(trials), *common])
        return int(json.loads((out / "2.search.json").read_text())["trials"])

    first = search(model, chats, 3)
    assert search(model, chats, first + 1) > first > 0
    others = write_replies(tmp_path / "others.jsonl", model, (7, 5))
    with pytest.raises(ConfigError, match=r"--out: .*2.search.json holds a run of another text; allowed"):
        search(model, others, 9)
    with pytest.raises(ConfigError, match="holds a run of another model; allowed"):
        search(save_target(tmp_path / "moved"), chats, 9)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off(source: Path, target: Path) -> None:
        raise OSError("broken off")

    path = tmp_path / "state.json"
    write_whole(path, "first")
    monkeypatch.setattr(os, "replace", broken_off)
    with pytest.raises(OSError, match="broken off"):
        write_whole(path, "second")
    assert path.read_text() == "first"

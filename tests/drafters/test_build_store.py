"""``python -m drafters.build_store``: whole or not there, and usable by the model it was made with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cluster.core.types import tokenizer_hash
from drafters.build_store import main
from drafters.datastore import INDEX, StoreHeader, open_store
from drafters.shipped_store import find_store

WORDS = {word: index for index, word in enumerate(["<unk>", "one", "two", "three", "four"])}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lines(path: Path, *objects: object) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in objects))
    return path


def test_ids_prompts_and_text_become_documents(tmp_path: Path, model: Path) -> None:
    source = lines(
        tmp_path / "in.jsonl",
        {"token_ids": [1, 2]},
        {"prompt_token_ids": [3], "token_ids": [4]},
        {"text": "two three"},
    )
    out = tmp_path / "stores" / "mine"
    assert main(["--input", str(source), "--out", str(out), "--model", str(model), "--note", "by hand"]) == 0
    header = StoreHeader.read(out)
    assert open_store(out).text.tolist() == [1, 2, 8, 3, 4, 8, 2, 3, 8]
    assert (header.vocab_size, header.num_tokens, header.num_documents) == (8, 9, 3)
    assert header.tokenizer_hash == tokenizer_hash(WORDS)
    assert header.provenance["note"] == "by hand"
    assert list(header.provenance["input"]) == ["in.jsonl"]
    assert find_store(str(out), 8, model) == out
    assert [path.name for path in out.parent.iterdir()] == ["mine"]


def test_a_store_can_be_cut_and_go_without_its_index(tmp_path: Path, model: Path) -> None:
    source = lines(tmp_path / "in.jsonl", *({"token_ids": [1, 2, 3]} for _ in range(5)))
    out = tmp_path / "out"
    flags = ["--input", str(source), "--out", str(out), "--model", str(model), "--max-tokens", "9", "--text-only"]
    assert main(flags) == 0
    assert not (out / INDEX).exists()
    assert len(open_store(out)) == 8


@pytest.mark.parametrize(
    ("line", "message"),
    [({"tokens": [1]}, "in.jsonl:2: .*allowed"), ([1], "in.jsonl:2"), ({"token_ids": [8]}, r"outside \[0, 8\)")],
)
def test_a_line_that_holds_no_document_is_named_and_nothing_is_left(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], line: object, message: str
) -> None:
    source = lines(tmp_path / "in.jsonl", {"token_ids": [1]}, line)
    out = tmp_path / "stores" / "mine"
    assert main(["--input", str(source), "--out", str(out), "--model", str(model)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(out.parent.iterdir()) == []


def test_a_store_that_is_there_is_not_overwritten(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lines(tmp_path / "in.jsonl", {"token_ids": [1]})
    assert main(["--input", str(source), "--out", str(tmp_path), "--model", str(model)]) == 2
    assert "is there already" in capsys.readouterr().err

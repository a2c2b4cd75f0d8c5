"""S3D's adapter: the folder it is kept in, and the training that fits it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from s3d_rig import SHAPE, adapter, holding, view_of
from test_create import save_model, stage
from tiny_models import VOCAB, random_tokens, tiny_config, tiny_rank, tiny_weights

from cluster.core.errors import ConfigError
from cluster.engine.kv_cache import SlotRows
from drafters import TargetFacts, create, s3d_adapter
from drafters.s3d import S3DDrafter
from drafters.s3d_adapter import S3DAdapter, S3DShape
from drafters.training import train_s3d
from drafters.training.frequent_tokens import frequent_tokens
from drafters.training.s3d_model import TwoStream, loss_of

# ---- the folder


def test_an_adapter_comes_back_from_its_folder_in_bf16(tmp_path: Path) -> None:
    made = adapter()
    made.save(tmp_path / "a")
    loaded = S3DAdapter.load(tmp_path / "a", tiny_config(), "hash")
    assert loaded.header == made.header
    assert {name: value.tolist() for name, value in loaded.tensors.items()} == {
        name: value.to(torch.bfloat16).tolist() for name, value in made.tensors.items()
    }


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with pytest.raises(ConfigError, match="not an S3D adapter"):
        S3DAdapter.load(folder, tiny_config(), None)
    adapter().save(folder)
    for config, tokenizer in ((tiny_config(84), "hash"), (tiny_config(num_layers=5), "hash"), (tiny_config(), "other")):
        with pytest.raises(ConfigError, match="made for 4 layers, 83 tokens and tokenizer hash"):
            S3DAdapter.load(folder, config, tokenizer)
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps({**header, "shape": {**header["shape"], "rank": 4}}))
    with pytest.raises(ConfigError, match="right size"):
        S3DAdapter.load(folder, tiny_config(), "hash")
    (folder / "header.json").write_text(json.dumps({**header, "format": 9}))
    with pytest.raises(ConfigError, match="format 9"):
        S3DAdapter.load(folder, tiny_config(), "hash")


@pytest.mark.parametrize("size", [0, VOCAB + 1])
def test_a_head_of_more_tokens_than_the_target_has_is_refused(tmp_path: Path, size: int) -> None:
    adapter(replace(SHAPE, head_size=size)).save(tmp_path / "a")
    with pytest.raises(ConfigError, match=f"head_size {size}; allowed: 1 to {VOCAB}"):
        S3DAdapter.load(tmp_path / "a", tiny_config(), "hash")


def test_saving_that_is_broken_off_leaves_the_older_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("broken off")

    made = adapter()
    made.save(tmp_path / "a")
    monkeypatch.setattr(s3d_adapter, "save_file", broken_off)
    with pytest.raises(OSError, match="broken off"):
        made.save(tmp_path / "a")
    assert S3DAdapter.load(tmp_path / "a", tiny_config(), "hash").header == made.header


def test_a_view_without_masks_runs() -> None:
    """One token a pass: its table of masks has no row to look up."""
    rank, made = tiny_rank(), adapter(replace(SHAPE, gamma=1))
    slot = holding(rank, [5, 9, 17])
    rows = SlotRows(slot, np.array([17], np.int32), np.array([-1], np.int32))
    assert view_of(rank, made).forward([rows]).shape == (1, VOCAB)


def test_by_name_it_runs_on_the_targets_rank_alone(tmp_path: Path) -> None:
    facts = TargetFacts(VOCAB, 512, tmp_path)
    adapter().save(tmp_path / "a")
    config = stage("s3d", options={"adapter": str(tmp_path / "a")})
    with pytest.raises(ConfigError, match="target's process"):
        create(config, target=facts)
    rank, slot_of = tiny_rank(), dict[str, int]().get
    assert isinstance(create(config, target=facts, rank=rank, slot_of=slot_of), S3DDrafter)
    with pytest.raises(ConfigError, match="none is shipped"):
        create(stage("s3d"), target=facts, rank=rank, slot_of=slot_of)
    deeper = stage("s3d", options={"adapter": str(tmp_path / "a"), "gamma": 4})
    with pytest.raises(ConfigError, match="gamma: 4"):
        create(deeper, target=facts, rank=rank, slot_of=slot_of)


# ---- training


def test_training_sees_what_a_draft_pass_sees() -> None:
    config, text = tiny_config(), random_tokens(9, 24)
    model = TwoStream(config, tiny_weights(config, 0), SHAPE)
    made = adapter()
    for name, value in model.trained.items():
        value.data.copy_(made.tensors[name])
    tokens, starts = torch.tensor(text), torch.tensor([4, 11, 20])
    _, kept = model.clean(tokens)
    with torch.no_grad():
        trained = model.logits(model.draft(tokens, starts, kept))
    for group, start in enumerate(starts.tolist()):
        rank = tiny_rank()
        slot = holding(rank, text[: start + 1])
        rows = np.array([text[start], VOCAB, VOCAB + 1], np.int32)
        drafted = view_of(rank, made).forward([SlotRows(slot, rows, np.array([-1, 0, 1], np.int32))])
        assert trained[group].numpy() == pytest.approx(drafted.numpy(), abs=1e-4)


def test_the_loss_is_zero_where_the_draft_is_the_target() -> None:
    config = tiny_config()
    one = S3DShape(num_layers=4, bottom=2, top=2, gamma=1, rank=2, head_size=VOCAB)
    model = TwoStream(config, tiny_weights(config, 0), one)
    loss, _ = loss_of(model, torch.tensor(random_tokens(10, 20)), torch.tensor([3, 9]), 0.8)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)


def write_chats(path: Path, count: int = 12) -> Path:
    lines = [{"chat": i, "token_ids": random_tokens(i % 3, 40), "replies": [[8, 20], [25, 40]]} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_training_lowers_the_loss_and_goes_on_where_it_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats, out = write_chats(tmp_path / "chats.jsonl"), tmp_path / "out"
    common = ["--model", str(save_model(tmp_path / "target")), "--chats", str(chats), "--dtype", "float32"]
    common += ["--bottom", "1", "--top", "2", "--gamma", "3", "--rank", "4", "--head-size", str(VOCAB), "--lr", "0.02"]
    common += ["--held-out", "3", "--save-every", "10", "--groups", "8"]

    def train(folder: Path, steps: int) -> dict[str, object]:
        train_s3d.main([*common, "--out", str(folder), "--steps", str(steps)])
        result: dict[str, object] = json.loads(capsys.readouterr().out)
        return result

    first = train(out, 10)
    second = train(out, 30)
    assert (first["steps"], second["steps"]) == (10, 30)
    assert float(str(second["loss"])) < 0.8 * float(str(first["loss"]))
    train(tmp_path / "at once", 30)
    broken_off, at_once = (S3DAdapter.load(folder, tiny_config(), None) for folder in (out, tmp_path / "at once"))
    assert all(torch.equal(value, at_once.tensors[name]) for name, value in broken_off.tensors.items())
    assert broken_off.header.provenance["steps"] == 30


def test_training_starts_from_an_adapter_that_keeps_more_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats, wide, narrow = write_chats(tmp_path / "chats.jsonl"), tmp_path / "wide", tmp_path / "narrow"
    common = ["--model", str(save_model(tmp_path / "target")), "--chats", str(chats), "--dtype", "float32"]
    common += ["--gamma", "3", "--head-size", str(VOCAB), "--held-out", "3", "--groups", "8", "--rank", "4"]
    train_s3d.main([*common, "--out", str(wide), "--bottom", "2", "--top", "2", "--steps", "3", "--lr", "0.02"])
    start = ["--out", str(narrow), "--bottom", "1", "--top", "2", "--start", str(wide), "--lr", "0"]
    train_s3d.main([*common, *start, "--steps", "1"])
    started, known = (S3DAdapter.load(folder, tiny_config(), None).tensors for folder in (narrow, wide))
    assert len(started) == 1 + 3 * 8
    assert all(torch.equal(value, known[name]) for name, value in started.items())
    with pytest.raises(ConfigError, match=r"start: .* the same --gamma and --rank"):
        train_s3d.main([*common[:-1], "8", *start[2:], "--out", str(tmp_path / "third"), "--steps", "1"])


def test_another_runs_state_is_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats, out = write_chats(tmp_path / "chats.jsonl"), tmp_path / "out"
    model, other = save_model(tmp_path / "target"), save_model(tmp_path / "other", seed=1)
    common = ["--dtype", "float32", "--gamma", "3", "--rank", "4", "--bottom", "1", "--held-out", "3", "--groups", "8"]
    common += ["--out", str(out), "--steps", "1"]
    right = ["--model", str(model), "--chats", str(chats), "--top", "2"]
    train_s3d.main([*common, *right])
    others = {
        "model": ["--model", str(other)],
        "text": ["--chats", str(write_chats(tmp_path / "more.jsonl", 13))],
        "shape": ["--top", "1"],
        "seed": ["--seed", "2"],
    }
    for name, changed in others.items():
        with pytest.raises(ConfigError, match=f"--out: .* holds a run of another {name}; allowed"):
            train_s3d.main([*common, *right, *changed])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_s3d.main([*common, *right, "--start", "default"])
    assert "--start" in capsys.readouterr().err
    state = torch.load(out / "training.pt")
    torch.save({name: value for name, value in state.items() if name != "run"}, out / "training.pt")
    with pytest.raises(ConfigError, match="another model and text and shape"):  # whose it is was not noted in the past
        train_s3d.main([*common, *right])


@pytest.mark.parametrize(
    ("option", "value", "least"), [("--groups", "3", 4), ("--held-out", "0", 1), ("--gamma", "0", 1)]
)
def test_what_nothing_can_be_measured_with_is_refused(
    option: str, value: str, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_s3d.main(["--chats", "chats.jsonl", "--out", "out", option, value])
    assert f"{option}: {value} is not allowed; allowed: {least} and more" in capsys.readouterr().err


def test_chats_without_room_for_a_group_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(
        '{"token_ids": [1, 2, 3, 4, 5, 6], "replies": [[3, 6]]}\n{"token_ids": [1, 2, 3, 4], "replies": [[3, 4]]}\n'
    )
    chats = train_s3d.read_chats([path], 2, 64, "cpu")
    assert [(chat.tokens.tolist(), chat.places) for chat in chats] == [([1, 2, 3, 4, 5, 6], [2, 3])]


def test_frequent_tokens_are_counted_in_replies_alone(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"token_ids": [9, 9, 9, 5, 5, 7, 6], "replies": [[3, 7]]}\n')
    assert frequent_tokens([path], 12, 2) == [5, 6]
    assert frequent_tokens([path], 12, 4) == [0, 5, 6, 7]

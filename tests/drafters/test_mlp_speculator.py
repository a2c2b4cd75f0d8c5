"""The network on the target's hidden states: alike in both kernels, trained, saved, and driven by real verify steps."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCAB, save_tiny_llama
from tiny_models import save_target, training_arguments

from cluster.core.errors import ConfigError, UnknownSession
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from cluster.core.warp import History
from cluster.engine.kernels import choose_kernels
from cluster.engine.rank import Rank, build_rank
from cluster.engine.verifier import Verifier, Verify
from drafters import Ask
from drafters.mlp_head import HeadHeader, MlpHead, load_head, save_head
from drafters.mlp_speculator import MlpSpeculator, load_mlp
from drafters.options import MlpOptions
from drafters.shipped import tokenizer_of
from drafters.training import train_head
from drafters.training.trainer import run

HIDDEN, HEAD_TOKENS = 64, 96


def save_random(folder: Path, target: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    network = MlpHead(HIDDEN, 48, 2, 1e-5)
    tokenizer = tokenizer_of(target)
    assert tokenizer is not None
    save_head(folder, HeadHeader(tokenizer, HIDDEN, 48, 2, 1e-5, 4, {}), network, torch.arange(HEAD_TOKENS) * 2)
    return folder


def make_rank(target: Path, dtype: str, kernels: str = "torch") -> Rank:
    return build_rank(target, dtype, num_slots=2, capacity=128, scratch=48, kernels=kernels, threads=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.15)])
def test_native_and_torch_kernels_agree_with_the_network(
    target: Path,
    tmp_path: Path,
    dtype: str,
    tolerance: float,
) -> None:
    folder = save_random(tmp_path / "head", target)
    network, tensors = MlpHead(HIDDEN, 48, 2, 1e-5), load_head(folder, target, HIDDEN)[1]
    del tensors["head_tokens"]
    network.load_state_dict(tensors)
    rank = make_rank(target, "float32")
    assert rank.decoder.model is not None
    embedding = rank.decoder.model.embedding
    states, tokens = torch.randn(5, HIDDEN), torch.tensor([3, 200, 7, 7, 90])
    expected = network(states, embedding[tokens])
    for kernels in ("torch", "native"):
        forward, head_tokens = load_mlp(folder, target, make_rank(target, dtype, kernels))
        found = forward.advance(tokens, states.to(getattr(torch, dtype)))
        assert torch.allclose(found.float(), expected, atol=tolerance, rtol=tolerance), kernels
        logits = network.final_norm(expected) @ embedding[head_tokens].T
        assert torch.allclose(forward.logits(found), logits, atol=10 * tolerance, rtol=tolerance), kernels


def test_what_is_saved_comes_back_within_the_rounding_of_int8(target: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    saved = MlpHead(HIDDEN, 48, 2, 1e-5).state_dict()
    _, loaded = load_head(save_random(tmp_path / "head", target, seed=7), target, HIDDEN)
    assert loaded.pop("head_tokens").tolist() == [2 * index for index in range(HEAD_TOKENS)]
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        bound = value.abs().amax(-1, keepdim=True) / 254 if value.dim() == 2 else torch.zeros(1)
        assert ((loaded[name] - value).abs() <= 1.01 * bound).all(), name


def verify(verifier: Verifier, slot: int, text: list[int], tree: TokenTree, lead: list[int] | None = None) -> list[int]:
    params = SamplingParams(temperature=0.0)
    work = Verify(slot, text[-1], tree, params, History(text, (), params), len(text), frozenset(), lead or ())
    (block,), _ = verifier.step([], [work])
    return list(block.tokens)  # type: ignore[union-attr]


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_tips_are_what_the_head_saw(target: Path, kernels: str) -> None:
    """Of each session the hidden state that decided its newest token, whatever tree the step verified."""
    rank = make_rank(target, "float32", kernels)
    rank.tips = {}
    slot, verifier, text = rank.kv.allocate(), Verifier(rank), [5, 9, 17]
    text += verify(verifier, slot, text, TokenTree.empty(), text[:-1])
    right = verify_copy(target, kernels, text, 2)
    emitted = verify(verifier, slot, text, TokenTree.build([99, right[0]], [-1, -1], [0.5, 0.5]))
    text += emitted
    assert emitted[0] == right[0]
    assert len(emitted) == 2
    tip = rank.tips[slot]
    assert tip.length == len(text)
    assert rank.decoder.model is not None
    logits = rank.decoder.model.embedding @ tip.features
    assert int(logits.argmax()) == text[-1]


def verify_copy(target: Path, kernels: str, text: list[int], count: int) -> list[int]:
    """What plain decoding says next, on a rank of its own."""
    rank = make_rank(target, "float32", kernels)
    slot, verifier, text = rank.kv.allocate(), Verifier(rank), list(text)
    said = verify(verifier, slot, text, TokenTree.empty(), text[:-1])
    while len(said) < count:
        said += verify(verifier, slot, text + said, TokenTree.empty())
    return said


@pytest.fixture
def setting(target: Path, tmp_path: Path) -> tuple[MlpSpeculator, Verifier, int]:
    rank = make_rank(target, "float32")
    slot = rank.kv.allocate()
    head = load_mlp(save_random(tmp_path / "head", target), target, rank)
    slots = {"s": slot}
    return MlpSpeculator(rank, slots.__getitem__, head, MlpOptions()), Verifier(rank), slot


@pytest.mark.parametrize("bias", [(), ((4, 50.0),)])
def test_trees_follow_the_commits(setting: tuple[MlpSpeculator, Verifier, int], bias: tuple[Any, ...]) -> None:
    drafter, verifier, slot = setting
    text = [5, 9, 17]
    drafter.begin("s", text, SamplingParams(temperature=0.0, logit_bias=bias), 3)
    assert drafter.propose([Ask("s", 8, 4)], {}) == {}  # nothing decided yet
    new = verify(verifier, slot, text, TokenTree.empty(), text[:-1])
    drafter.commit("s", new)
    hints = {"s": TokenTree.chain([2, 4, 6])}
    tree = drafter.propose([Ask("s", 8, 4)], hints)["s"]
    assert 0 < len(tree) <= 8
    assert set(tree.tokens.tolist()) <= set(range(0, 2 * HEAD_TOKENS, 2))
    assert tree.child(-1, 4) is not None or not bias
    drafter.commit("s", [7])  # not what the target decided: its hidden state is of another text
    assert drafter.propose([Ask("s", 8, 4)], {}) == {}
    drafter.end("s")
    with pytest.raises(UnknownSession):
        drafter.commit("s", [1])


def arguments(target: Path, chats: Path, out: Path) -> argparse.Namespace:
    return training_arguments(target, chats, out, blocks=1, inner=48, depth=3, places=1.0, epochs=6)


def test_training_lowers_the_loss_and_goes_on_where_it_was(target: Path, chats: Path, tmp_path: Path) -> None:
    args = arguments(target, chats, tmp_path / "head")
    work = train_head.HeadTrainer(target, args)
    losses = [work.train(batch) for _, batch in zip(range(30), work.batches())]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    torch.save(work.state(), args.work / "state.pt")
    reached = run(train_head.HeadTrainer, args)
    assert reached["steps"] == work.num_steps > 30
    assert len(reached["agreement_on_unseen_chats"]) == 3
    load_mlp(args.out, target, make_rank(target, "float32"))


def test_a_folder_of_another_run_is_not_gone_on_with(target: Path, chats: Path, tmp_path: Path) -> None:
    args = arguments(target, chats, tmp_path / "head")
    train_head.HeadTrainer(target, args)
    train_head.HeadTrainer(target, args)
    args.longest = 32
    with pytest.raises(ConfigError, match=r"--work: .* holds a run of another text; allowed"):
        train_head.HeadTrainer(target, args)


def test_nor_one_of_another_shape_or_seed(target: Path, chats: Path, tmp_path: Path) -> None:
    train_head.HeadTrainer(target, arguments(target, chats, tmp_path / "head"))
    for name, value, known_as in (
        ("blocks", 2, "blocks"),
        ("inner", 40, "inner"),
        ("depth", 2, "depth"),
        ("seed", 1, "seed"),
    ):
        args = arguments(target, chats, tmp_path / "head")
        setattr(args, name, value)
        with pytest.raises(ConfigError, match=f"holds a run of another {known_as}; allowed"):
            train_head.HeadTrainer(target, args)


def test_pieces_without_room_for_a_walk_are_left_out(target: Path, tmp_path: Path) -> None:
    """A mean over no place is NaN, and one such step spoils all weights."""
    path = tmp_path / "chats.jsonl"
    sizes = [24, 3, 24, 4, 24, 3, 3]  # the last, which would be held out, among those without room
    lines = [{"token_ids": [5, 9, 17] * 8, "replies": [[1, size]]} for size in sizes]
    for line, size in zip(lines, sizes):
        line["token_ids"] = line["token_ids"][:size]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = arguments(target, path, tmp_path / "head")
    args.batch_tokens, args.epochs, args.places = 8, 2, 1e-9  # one piece a batch, of which no place is drawn
    work = train_head.HeadTrainer(target, args)
    losses = [work.train(batch) for batch in work.batches()]
    assert len(losses) == 2 * 3
    assert all(math.isfinite(value) for value in [*losses, *work.agreement()])
    args.longest = 3
    with pytest.raises(ConfigError, match="--chats: 0 pieces of more than 3 tokens"):
        train_head.HeadTrainer(target, args)


def test_a_model_without_tokenizer_is_refused_before_the_first_step(target: Path, chats: Path, tmp_path: Path) -> None:
    bare = save_tiny_llama(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"--model: .* has no tokenizer.json"):
        train_head.HeadTrainer(bare, arguments(bare, chats, tmp_path / "head"))


@pytest.mark.parametrize("option", ["--blocks", "--depth"])
def test_a_network_of_nothing_is_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_head.main(["--chats", "chats.jsonl", "--out", str(tmp_path), option, "0"])
    assert f"{option}: 0 is not allowed; allowed: 1 and more" in capsys.readouterr().err


def test_another_models_network_is_refused(target: Path, tmp_path: Path) -> None:
    other = save_target(tmp_path / "other", words="v")
    with pytest.raises(ConfigError, match="another model"):
        load_mlp(save_random(tmp_path / "head", target), other, make_rank(other, "float32"))


def test_a_network_whose_tensors_do_not_fit_together_is_refused(target: Path, tmp_path: Path) -> None:
    folder, rank = save_random(tmp_path / "head", target), make_rank(target, "float32")
    tensors = load_file(folder / "head.safetensors")
    torn = {"blocks.1.down.weight": torch.zeros(HIDDEN, 40), "mix.weight": torch.zeros(HIDDEN, HIDDEN)}
    for name, value in torn.items():
        rest = {other: kept for other, kept in tensors.items() if not other.startswith(name)}
        save_file({**rest, name: value}, folder / "head.safetensors")
        with pytest.raises(ConfigError, match=f"head: .* among them {name} of .*; allowed"):
            load_mlp(folder, target, rank)
    save_file({**tensors, "head_tokens": torch.tensor([3, VOCAB])}, folder / "head.safetensors")
    with pytest.raises(ConfigError, match=f"allowed: ids from 0 to {VOCAB - 1}"):
        load_mlp(folder, target, rank)


def test_the_kernels_of_a_dtype_without_native_form_do_it_too(target: Path, tmp_path: Path) -> None:
    assert choose_kernels("auto", "float64").name == "torch"
    forward, head_tokens = load_mlp(save_random(tmp_path / "head", target), target, make_rank(target, "float64"))
    states = torch.zeros(1, HIDDEN, dtype=torch.float64)
    logits = forward.logits(forward.advance(torch.tensor([VOCAB - 1]), states))
    assert logits.shape == (1, len(head_tokens))

"""A draft model made of a target's layers: trained, saved, and loaded into the engine as it was trained."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCAB
from tiny_models import chain, save_target, training_arguments

from cluster.core.config import StageConfig
from cluster.core.errors import ConfigError
from cluster.core.types import SamplingParams
from cluster.engine.kernels import choose_kernels
from cluster.engine.rank import Rank, rank_of
from drafters import Ask, TargetFacts, create
from drafters.distilled import find_draft, load_draft
from drafters.training import distill
from drafters.training.trainer import run

HEAD_TOKENS = 96


def arguments(target: Path, chats: Path, out: Path) -> argparse.Namespace:
    return training_arguments(target, chats, out, layers="0,2,3", rank=8, epochs=4)


def draft_rank(folder: Path, target: Path) -> Rank:
    kernels = choose_kernels("torch", "float32")
    config, weights, head_tokens = load_draft(folder, target, torch.float32)
    return rank_of(config, weights, kernels, num_slots=1, capacity=64, scratch=32, head_tokens=head_tokens)


@pytest.fixture(scope="module")
def draft(target: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "draft"
    run(distill.Distillation, arguments(target, chats, folder))
    return folder


def test_training_brings_the_draft_closer_to_the_target(target: Path, chats: Path, tmp_path: Path) -> None:
    work = distill.Distillation(target, arguments(target, chats, tmp_path / "draft"))
    losses = [work.train(batch) for batch in work.batches()]
    assert len(losses) == work.num_steps
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_the_engine_computes_what_was_trained(target: Path, chats: Path, draft: Path, tmp_path: Path) -> None:
    work = distill.Distillation(target, arguments(target, chats, tmp_path / "draft"))
    values = work.trained()
    with torch.no_grad():
        for name, value in load_file(draft / "draft.safetensors").items():
            if name != "head_tokens":
                values[name].copy_(value)
    work.module.float()
    tokens = [5, 9, 17, 30, 5]
    states = work.module(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    expected = states @ work.head.float().T
    rank = draft_rank(draft, target)
    logits = rank.forward([chain(rank.kv.allocate(), tokens)])
    assert torch.allclose(logits[:, work.head_tokens], expected, atol=0.05)  # trained on weights in bf16
    assert int(torch.isinf(logits).sum()) == len(tokens) * (VOCAB - HEAD_TOKENS)


def test_a_run_that_is_broken_off_goes_on_to_the_same_end(
    target: Path, chats: Path, draft: Path, tmp_path: Path
) -> None:
    args = arguments(target, chats, tmp_path / "draft")
    args.work.mkdir()
    torch.manual_seed(args.seed)
    first = distill.Distillation(target, args)
    for _, batch in zip(range(7), first.batches()):
        first.train(batch)
    torch.save(first.state(), args.work / "state.pt")
    run(distill.Distillation, args)
    whole, resumed = (load_file(folder / "draft.safetensors") for folder in (draft, args.out))
    assert whole.keys() == resumed.keys()
    assert all(torch.allclose(whole[name].float(), resumed[name].float(), atol=1e-2) for name in whole)


def test_it_drafts_for_its_target(target: Path, draft: Path) -> None:
    stage = StageConfig.model_validate(
        {"name": "medium", "drafter": "draft_model", "model": {"source": str(draft), "dtype": "float32"}}
    )
    drafter = create(stage, target=TargetFacts(VOCAB, 64, target, "float32"))
    drafter.begin("s", [5, 9, 17], SamplingParams(temperature=0.0), 3)
    tree = drafter.propose([Ask("s", 8, 4)], {})["s"]
    assert 0 < len(tree) <= 8
    assert set(tree.tokens.tolist()) <= set(load_file(draft / "draft.safetensors")["head_tokens"].tolist())


def test_another_models_draft_is_refused(draft: Path, tmp_path: Path) -> None:
    other = save_target(tmp_path / "other", words="v")
    with pytest.raises(ConfigError, match="another tokenizer"):
        load_draft(draft, other, torch.float32)
    with pytest.raises(ConfigError, match="no draft model is shipped"):
        find_draft("default", other)


def test_a_run_of_other_layers_is_not_gone_on_with(target: Path, chats: Path, tmp_path: Path) -> None:
    """As many, of the same sizes: the tensors would fit."""
    args = arguments(target, chats, tmp_path / "draft")
    distill.Distillation(target, args)
    args.layers = "0,1,3"
    with pytest.raises(ConfigError, match=r"--work: .* holds a run of another layers; allowed"):
        distill.Distillation(target, args)
    args.layers, args.rank, args.seed = "0,2,3", 4, 1
    with pytest.raises(ConfigError, match="another seed and rank"):
        distill.Distillation(target, args)


@pytest.mark.parametrize("given", ["5,", "a", "0,4", "0,-1", "5"])
def test_layers_the_target_does_not_have_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--layers: .*(allowed|outside)"):
        distill.chosen_layers(given, 4)


def test_layers_are_spread_from_the_first_to_the_last() -> None:
    assert distill.spread_layers(30, 6) == distill.chosen_layers("6", 30) == [0, 6, 12, 17, 23, 29]
    assert distill.chosen_layers("0,2,3", 4) == [0, 2, 3]
    with pytest.raises(ConfigError, match="--layers: 1"):
        distill.spread_layers(30, 1)

"""The staged benchmark's replay: a medium that is the target itself is always right, one of random weights rarely."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCAB, save_tiny_llama

from benchmarks.accepted_length import Record
from benchmarks.mediums import DistilledMedium, HeadMedium, chain
from benchmarks.staged import CHAIN, FORMS, measure
from cluster.core.accept import decide
from cluster.core.types import SamplingParams
from cluster.core.warp import History
from cluster.engine.rank import build_rank
from cluster.engine.weights import load_weights, read_config
from drafters.distilled import LINEARS, DraftHeader, save_draft
from drafters.mlp_head import HeadHeader, MlpHead, save_head


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def records(target: Path) -> list[Record]:
    """The target's own greedy answers."""
    return answers(target, [SamplingParams(temperature=0.0)] * 4)


def answers(target: Path, params: list[SamplingParams]) -> list[Record]:
    rank = build_rank(target, "float32", num_slots=1, capacity=1, scratch=64, threads=1)
    draw = np.random.default_rng(0)
    made = []
    for chosen in params:
        text = [int(token) for token in draw.integers(2, VOCAB, 9)]
        for _ in range(20):
            slot = rank.kv.allocate()
            row = rank.forward([chain(slot, text, len(text) - 1)])[0].numpy()
            text.append(decide(row, chosen, History((), (), chosen), len(text), frozenset()).token)
            rank.kv.free(slot)
        made.append(Record("any", text[:9], text[9:], chosen))
    return made


@pytest.fixture
def medium(target: Path, records: list[Record], tmp_path: Path) -> DistilledMedium:
    """The whole target."""
    config = read_config(target)
    whole = load_weights(target, config, torch.float32)
    values = {"norm.weight": whole["model.norm.weight"]}
    for layer in range(config.num_layers):
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            values[f"layers.{layer}.{norm}"] = whole[f"model.layers.{layer}.{norm}"]
        for name in LINEARS:
            outputs, inputs = whole[f"model.layers.{layer}.{name}.weight"].shape
            values |= {f"layers.{layer}.{name}.a": torch.ones(1, inputs)}
            values |= {f"layers.{layer}.{name}.b": torch.zeros(outputs, 1)}
    header = DraftHeader(None, tuple(range(config.num_layers)), {})
    save_draft(tmp_path, header, values, torch.arange(VOCAB))
    return DistilledMedium(str(tmp_path), target, records, "float32", 1)


def test_a_medium_that_is_the_target_is_always_right(
    records: list[Record], medium: DistilledMedium, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert medium.weight == pytest.approx(1.0)
    assert medium.agreement == 1.0
    monkeypatch.setitem(FORMS, "medium, chain", (False, {**CHAIN, "min_score": 0.0}))  # random weights are never sure
    row = measure("medium, chain", records, medium, None, 4)
    assert row["accepted_length"] == pytest.approx(20 / 4)
    assert row["tokens_by_origin"] == {"medium": 0.8, "target": 0.2}
    assert row["draft_passes_per_round"] == pytest.approx(4.0)


def test_it_is_right_about_sampled_answers_too(
    target: Path, medium: DistilledMedium, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their seeds are the drafter's to know."""
    sampled = answers(target, [SamplingParams(temperature=1.0, top_k=5, seed=seed) for seed in range(4)])
    monkeypatch.setitem(FORMS, "medium, chain", (False, {**CHAIN, "min_score": 0.0}))
    assert measure("medium, chain", sampled, medium, None, 4)["accepted_length"] == pytest.approx(20 / 4)
    forgotten = [replace(record, params=SamplingParams(temperature=1.0, top_k=5, seed=99)) for record in sampled]
    assert measure("medium, chain", forgotten, medium, None, 4)["accepted_length"] < 3.0


def test_a_medium_of_random_weights_is_followed_too(target: Path, records: list[Record], tmp_path: Path) -> None:
    config = read_config(target)
    network = MlpHead(config.hidden_size, 32, 1, config.norm_eps)
    save_head(
        tmp_path, HeadHeader(None, config.hidden_size, 32, 1, config.norm_eps, 3, {}), network, torch.arange(VOCAB)
    )
    medium = HeadMedium(str(tmp_path), target, records, "float32", 1)
    assert 0.0 <= medium.agreement < 0.5
    for form in ("small", "medium, tree", "staged, tree"):
        row = measure(form, records, medium, None, 8)
        assert 1.0 <= row["accepted_length"] < 3.0
        assert (row["draft_passes_per_round"] > 0.5) == (form != "small")

"""Drafters are made by name; whatever cannot work is refused at start, naming what is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from thread_crew import ThreadCrew
from tiny_models import GREEDY, VOCAB, chain, continuation, random_tokens, tiny_config, tiny_rank, tiny_weights
from tokenizers import Tokenizer, models, pre_tokenizers

from cluster.core.config import ModelConfig, StageConfig
from cluster.core.errors import ConfigError
from cluster.core.types import Origin
from cluster.engine.tensor_parallel import Recruiter
from drafters import Ask, TargetFacts, create, reads_target
from drafters.distilled import HEADER
from drafters.draft_model import ModelDrafter
from drafters.shipped import tokenizer_of
from drafters.sssd import SssdDrafter
from drafters.staged import StagedDrafter
from drafters.swift import SwiftDrafter


def save_model(folder: Path, vocab_size: int = VOCAB, seed: int = 0) -> Path:
    """A tiny model as transformers stores it, but for its rotary frequencies: those are the stock ones."""
    config = tiny_config(vocab_size)
    folder.mkdir()
    save_file(tiny_weights(config, seed), folder / "model.safetensors")
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def facts(tmp_path: Path) -> TargetFacts:
    return TargetFacts(VOCAB, 512, save_model(tmp_path / "target"), "float32")


def stage(drafter: str, name: str = "medium", **fields: Any) -> StageConfig:
    return StageConfig.model_validate({"name": name, "drafter": drafter, "max_sessions": 2, **fields})


def test_who_has_a_model_of_its_own_does_not_read_the_targets_weights(tmp_path: Path) -> None:
    own, distilled = {"source": "owner/small"}, tmp_path / "distilled"
    distilled.mkdir()
    (distilled / HEADER).write_text("{}")
    assert not reads_target(stage("sssd"))
    assert not reads_target(stage("draft_model", model=own))
    small = {"drafter": "sssd"}
    assert not reads_target(
        stage("staged", options={"small": small, "medium": {"drafter": "draft_model", "model": own}})
    )
    assert reads_target(stage("draft_model"))
    assert reads_target(stage("draft_model", model={"source": str(distilled)}))
    assert reads_target(stage("draft_model", model={"source": "default"}))
    assert reads_target(stage("staged", options={"small": small, "medium": {"drafter": "swift"}}))


def test_sssd_is_made_in_the_stages_colour(facts: TargetFacts) -> None:
    drafter = create(stage("sssd", "medium", options={"query": 2}), target=facts)
    assert isinstance(drafter, SssdDrafter)
    assert drafter.stage == Origin.MEDIUM


@pytest.mark.parametrize("kind", ["draft_model", "swift"])
def test_a_model_drafter_loads_the_targets_weights_where_it_names_none(facts: TargetFacts, kind: str) -> None:
    options: dict[str, Any] = {"passes": 5, "children": 1, "min_score": 0.0} | ({"skip": []} if kind == "swift" else {})
    drafter = create(stage(kind, options=options), target=facts)
    assert isinstance(drafter, SwiftDrafter if kind == "swift" else ModelDrafter)
    assert drafter.vocab_size == VOCAB
    text = random_tokens(0, 61)
    drafter.begin("s", text, GREEDY, 61)
    tree = drafter.propose([Ask("s", 9, 9)], {})["s"]
    assert len(tree) == 64 - 61 + 1, "the draft model's own 64 positions bound the depth"


@pytest.mark.parametrize("kind", ["draft_model", "swift"])
def test_a_model_drafter_of_two_ranks_gives_one_ranks_trees(facts: TargetFacts, kind: str) -> None:
    options: dict[str, Any] = {"passes": 5, "min_score": 0.0} | ({"skip": [2, 3]} if kind == "swift" else {})
    text = random_tokens(0, 31)
    trees = []
    for size in (1, 2):
        model = {"source": str(facts.folder), "dtype": "float64", "tensor_parallel_size": size, "threads": 1}
        drafter = create(stage(kind, options=options, model=model), target=facts, recruiter=Recruiter(ThreadCrew))
        assert isinstance(drafter, ModelDrafter)
        drafter.begin("s", text[:20], GREEDY, 20)
        drafter.propose([Ask("s", 9, 9)], {})
        drafter.commit("s", text[20:])
        trees.append(drafter.propose([Ask("s", 9, 9)], {})["s"])
        drafter._rank.close()
    one, two = trees
    assert (one.tokens.tolist(), one.parents.tolist()) == (two.tokens.tolist(), two.parents.tolist())
    assert len(one) == 9


@pytest.mark.parametrize("drafter", ["draft_model", "staged"])
def test_several_ranks_need_somebody_to_start_them(facts: TargetFacts, drafter: str) -> None:
    model = {"source": str(facts.folder), "dtype": "float32", "tensor_parallel_size": 2}
    config = stage("draft_model", model=model)
    if drafter == "staged":
        part = {"drafter": "draft_model", "model": model}
        config = stage("staged", options={"small": {"drafter": "sssd"}, "medium": part})
    with pytest.raises(ConfigError, match="tensor_parallel_size: 2 is for remote stages"):
        create(config, target=facts)


def test_swift_on_the_targets_rank_loads_nothing() -> None:
    rank, text = tiny_rank(), random_tokens(1, 12)
    slot = rank.kv.allocate()
    rank.forward([chain(slot, text[:-1], logits=False)])
    rank.kv.commit(slot, range(11))
    facts = TargetFacts(VOCAB, 100, Path("nowhere"))
    config = stage("swift", options={"skip": [], "children": 1, "passes": 3, "min_score": 0.0})
    drafter = create(config, target=facts, rank=rank, slot_of={"s": slot}.get)
    drafter.begin("s", text, GREEDY, 12)
    assert drafter.propose([Ask("s", 3, 3)], {})["s"].tokens.tolist() == continuation(tiny_rank(), text, GREEDY, 3)


def test_staged_is_made_of_two_stage_configurations(facts: TargetFacts) -> None:
    options = {"small": {"drafter": "sssd"}, "medium": {"drafter": "draft_model"}}
    drafter = create(stage("staged", options=options), target=facts)
    assert isinstance(drafter, StagedDrafter)
    assert drafter.stage == Origin.MEDIUM
    drafter.begin("s", [1, 2, 3, 1, 2], GREEDY, 5)
    tree = drafter.propose([Ask("s", 12, 4)], {})["s"]
    tree.check(VOCAB, 12, 4)
    assert Origin.MEDIUM in tree.stages


@pytest.mark.parametrize(
    ("drafter", "options", "message"),
    [
        ("sssd", {"querry": 3}, "querry.*allowed: query, max_tokens, store, chain, live"),
        ("sssd", {"query": 0}, "query"),
        ("draft_model", {"skip": [1]}, "skip.*allowed: passes, "),
        ("swift", {"pases": 1}, "pases.*allowed: .*skip"),
        ("swift", {"skip": "uniform:40"}, r"uniform:40.*\[0, 4\]"),
        ("staged", {"small": {"drafter": "sssd"}}, "medium"),
        ("staged", {"small": {"drafter": "sssd", "x": 1}, "medium": {"drafter": "sssd"}}, "x: "),
    ],
)
def test_options_that_mean_nothing_are_refused(
    facts: TargetFacts, drafter: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        create(stage(drafter, options=options), target=facts)


@pytest.mark.parametrize("drafter", ["draft_model", "swift", "staged"])
def test_a_vocabulary_that_is_not_the_targets_is_refused_naming_both_sizes(
    facts: TargetFacts, tmp_path: Path, drafter: str
) -> None:
    other = ModelConfig(source=str(save_model(tmp_path / "draft", vocab_size=90)), dtype="float32")
    config = stage(drafter, model=other)
    if drafter == "staged":
        part = {"drafter": "draft_model", "model": other.model_dump()}
        config = stage("staged", options={"small": {"drafter": "sssd"}, "medium": part})
    with pytest.raises(ConfigError, match=f"90 tokens.*{VOCAB}"):
        create(config, target=facts)


def test_a_model_of_another_vocabulary_guesses_through_text(facts: TargetFacts, tmp_path: Path) -> None:
    other = save_model(tmp_path / "draft", vocab_size=90)
    config = stage("draft_model", model={"source": str(other), "dtype": "float32"}, options={"translate": True})
    with pytest.raises(ConfigError, match=f"translate: {other} has no tokenizer.json"):
        create(config, target=facts)
    for folder, size in ((other, 90), (facts.folder, VOCAB)):
        words = {"<unk>": 0} | {f"w{index}": index for index in range(1, size)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_of.cache_clear()
    drafter = create(config, target=facts)
    assert drafter.vocab_size == VOCAB
    drafter.begin("s", [5, 6, 7], GREEDY, 3)
    tree = drafter.propose([Ask("s", 8, 4)], {}).get("s")
    if tree is not None:
        tree.check(VOCAB, 8, 4)
    with pytest.raises(ConfigError, match="translate: the stage names no model"):
        create(stage("draft_model", options={"translate": True}), target=facts)


def test_rank_and_slots_come_together(facts: TargetFacts) -> None:
    with pytest.raises(ConfigError, match="slot_of"):
        create(stage("sssd"), target=facts, rank=tiny_rank())

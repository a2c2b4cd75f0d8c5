"""Which sizes are allowed, and that shards together are the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cluster.core.errors import ConfigError
from cluster.engine.model_config import read_config
from cluster.engine.shard import Shard, allowed_sizes, check_size
from cluster.engine.tensor_parallel import build_sharded_rank
from cluster.engine.weights import load_weights


@pytest.fixture(scope="module")
def config(make_model):  # type: ignore[no-untyped-def]
    return read_config(make_model("llama")[1])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "allowed"),
    [(9, 3, [1, 3, 9]), (32, 8, [1, 2, 4, 8, 16, 32]), (12, 6, [1, 2, 3, 6, 12]), (6, 1, [1, 2, 3, 6])],
)
def test_ranks_divide_the_heads_and_divide_or_multiply_the_kv_heads(config, heads, kv_heads, allowed) -> None:  # type: ignore[no-untyped-def]
    assert allowed_sizes(replace(config, num_heads=heads, num_kv_heads=kv_heads)) == allowed


def test_a_size_that_does_not_divide_is_refused_with_the_sizes_that_do(config) -> None:  # type: ignore[no-untyped-def]
    words = "tensor_parallel_size: 2 .* 9 attention heads and 3 KV heads .*: 1, 3, 9$"
    with pytest.raises(ConfigError, match=words):
        check_size(replace(config, num_heads=9, num_kv_heads=3), 2)


def test_it_is_refused_before_a_weight_is_read_or_a_rank_started(make_model, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "config.json").write_text((make_model("llama")[1] / "config.json").read_text())

    def recruit(plans):  # type: ignore[no-untyped-def]
        raise AssertionError(plans)

    with pytest.raises(ConfigError, match="allowed for this model: 1, 2, 6"):
        build_sharded_rank(tmp_path, "float64", 4, recruit, num_slots=1, capacity=16, scratch=8)


@pytest.mark.parametrize("size", [2, 6])
def test_the_shards_weights_are_the_models_each_row_and_column_once(make_model, size) -> None:  # type: ignore[no-untyped-def]
    _, folder = make_model("llama", attention_bias=True, mlp_bias=True)
    config = read_config(folder)
    whole = load_weights(folder, config, torch.float32)
    shards = [load_weights(folder, config, torch.float32, Shard(rank, size)) for rank in range(size)]
    for name, weight in whole.items():
        parts = [shard[name] for shard in shards if name in shard]
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            assert len(parts) == 1
            assert name in shards[0]
        elif "norm" in name:
            assert all(torch.equal(part, weight) for part in parts)
            continue
        elif ("k_proj" in name or "v_proj" in name) and size > config.num_kv_heads:
            parts = parts[:: size // config.num_kv_heads]  # neighbours hold the same head
        columns = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert torch.equal(torch.cat(parts, 1 if columns else 0), weight)
    held = sum(weight.numel() for weight in shards[1].values())
    assert held < sum(weight.numel() for weight in whole.values()) * (1 / size + 0.1)

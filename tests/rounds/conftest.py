"""The tiny target of the exactness tests in each dtype, and a draft model for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from exactness_rig import Rig
from tiny import save_tiny_llama


@pytest.fixture(scope="module", params=["float64", pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return Rig(save_tiny_llama(tmp_path_factory.mktemp("target")), request.param)


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("draft"), layers=1, seed=7)

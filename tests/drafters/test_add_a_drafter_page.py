"""The page that explains how to add a drafter is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cluster.core.config import StageConfig
from cluster.core.errors import ConfigError
from cluster.core.types import Origin, SamplingParams
from drafters.base import Ask

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_a_drafter.md"


def run_page() -> dict[str, Any]:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_every_block_of_the_page_runs_and_its_checks_hold() -> None:
    run_page()


def test_the_pages_factory_builds_a_drafter_and_refuses_unknown_options() -> None:
    factory = run_page()["_repeat"]
    stage = StageConfig(name="medium", drafter="sssd", options={"match": 1})
    drafter = factory(stage, None)
    drafter.begin("s", [5, 6, 5], SamplingParams(), 3)
    tree = drafter.propose([Ask("s", 4, 4)], {})["s"]
    assert tree.tokens.tolist() == [6, 5]
    assert tree.stages.tolist() == [Origin.MEDIUM] * 2
    with pytest.raises(ConfigError, match="allowed: match"):
        factory(stage.model_copy(update={"options": {"width": 1}}), None)

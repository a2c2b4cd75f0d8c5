"""docs/methods.md holds: its tables are the results', its configurations are valid, its files exist."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from benchmarks import method_tables
from cluster.core.config import DraftersConfig, ServiceConfig, StageConfig, parse_config
from cluster.core.errors import ConfigError
from drafters.options import GrowthOptions, MlpOptions, S3DOptions, SssdOptions, StagedOptions, SwiftOptions

ROOT = Path(__file__).resolve().parents[2]
TEXT = method_tables.PAGE.read_text()
SNIPPETS = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
OPTIONS: dict[str, type[BaseModel]] = {
    "sssd": SssdOptions,
    "draft_model": GrowthOptions,
    "swift": SwiftOptions,
    "s3d": S3DOptions,
    "mlp_speculator": MlpOptions,
    "staged": StagedOptions,
}


def test_the_committed_tables_are_those_of_the_results() -> None:
    assert method_tables.stale(TEXT, method_tables.read_results()) == []


@pytest.mark.parametrize(
    ("file", "path", "tables"),
    [
        ("staged", ("rows", -1, "relative_weight_traffic"), ["staged"]),
        ("staged", ("draft_weight",), ["staged_paper", "methods_speed"]),
        ("accepted_length", ("rows", 0, "propose_us", "p95"), ["sssd"]),
        ("accepted_length", ("rows", -1, "by_part", 0, 1), ["sssd_live"]),
        ("accepted_length_long", ("rows", 0, "by_category", "as they are"), ["sssd_long"]),
        ("side_by_side", ("memory_mb", "sssd"), ["sssd_speed"]),
        ("swift", ("matchness", 0, "found"), ["swift", "swift_paper"]),
        ("swift", ("stream", "search_share"), ["swift_search", "swift_paper"]),
        ("coupling", ("ratio",), ["coupling"]),
        ("s3d", ("trained", "rows", 0, "draft_ms"), ["s3d"]),
        ("s3d", ("beside", "rows", -1, "staged"), ["s3d_staged"]),
        ("side_by_side_methods", ("cells", 0, "ratios", "plain", "point"), ["methods_speed"]),
    ],
)
def test_a_changed_figure_is_noticed(file: str, path: tuple[Any, ...], tables: list[str]) -> None:
    results = copy.deepcopy(method_tables.read_results())
    place: Any = results[file]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] *= 2
    assert method_tables.stale(TEXT, results) == tables


def test_check_names_stale_tables_and_writing_makes_them_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "methods.md"
    page.write_text(TEXT.replace("| small | 36 |", "| small | 37 |"))
    monkeypatch.setattr(method_tables, "PAGE", page)
    assert method_tables.main(["--check"]) == 1
    assert capsys.readouterr().err == "methods.md: table staged is stale\n"
    assert method_tables.main([]) == 0
    assert method_tables.main(["--check"]) == 0
    assert page.read_text() == TEXT


def test_a_page_without_a_tables_place_is_refused() -> None:
    with pytest.raises(ValueError, match="table swift "):
        method_tables.stale(TEXT.replace("<!-- table swift -->", ""), method_tables.read_results())


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.split("\n")[0])
def test_configurations_are_valid(snippet: str) -> None:
    for stage in stages_of(yaml.safe_load(snippet)):
        check_options(stage)


def test_the_configurations_name_all_four_methods() -> None:
    named = {stage.drafter for snippet in SNIPPETS for stage in stages_of(yaml.safe_load(snippet))}
    assert named >= {"staged", "sssd", "swift", "s3d"}


def test_a_wrong_option_would_be_found() -> None:
    part = {"drafter": "swift", "options": {"skipp": "found:12"}}
    stage = StageConfig(name="medium", drafter="staged", options={"small": {"drafter": "sssd"}, "medium": part})
    with pytest.raises(ConfigError, match="skipp"):
        check_options(stage)


def test_linked_and_named_files_exist() -> None:
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    links = re.findall(r"\]\(([\w./-]+)", prose)
    named = re.findall(r"`([\w./-]+/[\w.-]*\.(?:py|cpp))`", prose)
    assert len(links) > 3
    assert len(named) > 10
    assert [link for link in links if not (method_tables.PAGE.parent / link).exists()] == []
    assert [name for name in named if not (ROOT / name).exists()] == []


def stages_of(data: dict[str, Any]) -> list[StageConfig]:
    """A snippet is a part of either application's arguments."""
    if "stages" in data:
        return list(parse_config(DraftersConfig, data).stages)
    config = parse_config(ServiceConfig, data)
    return [config.local_drafter] if config.local_drafter else []


def check_options(stage: StageConfig) -> None:
    options = parse_config(OPTIONS[stage.drafter], stage.options)
    if isinstance(options, StagedOptions):
        for name, part in (("small", options.small), ("medium", options.medium)):
            check_options(parse_config(StageConfig, {"name": name, **part}))

"""The structure the design promises: imports go one way, modules stay small, only one file touches ray.remote."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cluster", "drafters", "deployments")

# A layer may import itself and the layers below it (listed after it).
LAYERS = (
    "benchmarks",
    "deployments",
    "cluster",
    "cluster.rounds",
    "drafters",
    "cluster.engine",
    "cluster.core",
    "protos",
)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_results_name_no_place_on_the_machine_that_made_them(path: Path) -> None:
    assert not re.findall(r'"(?:/|\.\./)[^"]*"', path.read_text())


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def layer_of(module: str) -> str:
    return max((layer for layer in LAYERS if module == layer or module.startswith(f"{layer}.")), key=len, default="")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for name in imported(path):
        other = layer_of(name)
        if other and other not in ("protos", own):
            assert LAYERS.index(other) > LAYERS.index(own), f"{path.name} ({own}) imports {name} ({other})"


@pytest.mark.parametrize("layer", ["cluster/core", "cluster/rounds", "cluster/engine", "drafters"])
def test_the_core_the_engine_the_rounds_and_the_drafters_know_nothing_of_ray(layer: str) -> None:
    for path in (ROOT / layer).rglob("*.py"):
        assert not any(name.split(".")[0] == "ray" for name in imported(path)), path


def test_the_core_does_not_import_torch() -> None:
    for path in (ROOT / "cluster/core").rglob("*.py"):
        assert not any(name.split(".")[0] in ("torch", "transformers") for name in imported(path)), path


def test_only_launch_makes_actors() -> None:
    users = {path.name for path in modules() if "ray.remote(" in path.read_text() or "@ray.remote" in path.read_text()}
    assert users == {"launch.py"}


def test_no_module_is_longer_than_400_lines() -> None:
    for path in [*modules(), *(ROOT / "benchmarks").rglob("*.py")]:
        if "_pb2" not in path.name:
            assert len(path.read_text().splitlines()) <= 400, path

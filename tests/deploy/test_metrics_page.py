"""docs/metrics.md names every metric that a service exports, with its labels, and none besides."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.rounds.governor import Choice

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
EVERYWHERE = {"model_name", "engine"}
PARTS = re.compile("_(bucket|count|sum|created)$")


def rows() -> list[tuple[str, set[str], str]]:
    """(name, labels of its own, meaning) of every metric in the page's tables."""
    found = re.findall(r"^\| `([\w:]+)` \|([^|]*)\|([^|]*)\|[^|]*\|$", PAGE.read_text(), re.MULTILINE)
    return [(name, set(re.findall(r"`(\w+)`", labels)), meaning.strip()) for name, labels, meaning in found]


def test_every_exported_metric_is_on_the_page_with_its_labels_and_none_besides(exported: dict[str, set[str]]) -> None:
    real = {PARTS.sub("", name): labels - EVERYWHERE - {"le"} for name, labels in exported.items() if name != "up"}
    assert {name: labels for name, labels, _ in rows()} == real


def test_each_metric_stands_in_one_table_with_a_meaning() -> None:
    names = [name for name, _, _ in rows()]
    assert len(names) == len(set(names)) > 30
    assert all(meaning for _, _, meaning in rows())


@pytest.mark.parametrize("reason", Choice)
def test_the_page_tells_every_reason_of_the_governors(reason: Choice) -> None:
    (meaning,) = (meaning for name, _, meaning in rows() if name == "paceline:node_choices_total")
    assert f"`{reason}`" in meaning


def test_alerts_that_the_page_speaks_of_are_rules() -> None:
    rules = (PAGE.parents[1] / "deployments" / "dashboards" / "alerts.yaml").read_text()
    alarmed = [
        name
        for line in PAGE.read_text().splitlines()
        if "(alert)" in line
        for name in re.findall(r"`([\w:]+)`", line)[:1]
    ]
    assert len(alarmed) >= 4
    assert all(name in rules for name in alarmed)

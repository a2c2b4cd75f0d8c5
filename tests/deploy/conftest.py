"""What a busy service exports, for those who ask for it: the dashboard, the alert rules, the page about metrics."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.core.stats import EngineStats, GovernorReport, Histogram, Load, StageStats
from deployments.metrics import render

BY_STAGE = {"small": 1, "medium": 1}


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Every metric that a busy service exports, by the name a query uses, with its labels."""
    seconds = Histogram((0.1,), (1, 0), 0.05)
    stats = EngineStats(1, 1, 1, 1, 1, 1, BY_STAGE, BY_STAGE, {"stop": 1}, seconds, seconds, seconds, seconds, (1,))
    governor = GovernorReport("local", {"local": 1.0}, {1: 1}, 1.0, 1.0, 1.0, seconds, {"best_pay": 1})
    stages = {"small": StageStats(draft_age=seconds)}
    load = Load(
        1, 1, 1, 8, drafter_sessions=BY_STAGE, deadline_misses=BY_STAGE, stats=stats, governor=governor, stages=stages
    )
    text, _ = render("model", [("replica", load)])
    names: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names

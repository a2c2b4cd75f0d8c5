"""Dashboard and alert rules ask for what `GET /metrics` really has, and the rules fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DASHBOARDS = Path(__file__).resolve().parents[2] / "deployments" / "dashboards"
SCRAPE_LABELS = {"job", "le"}


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DASHBOARDS / "paceline.json").read_text())
    return loaded


def dashboard_queries() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DASHBOARDS / "alerts.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def names_in(query: str) -> set[str]:
    return set(re.findall(r"\b(?:vllm|paceline):\w+", query))


def labels_in(query: str) -> set[str]:
    selectors = re.findall(r"[{,]\s*(\w+)=~?\"", query)
    grouped = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query)
    return {*selectors, *(label.strip() for group in grouped for label in group.split(","))}


@pytest.mark.parametrize("query", [*dashboard_queries(), *(rule["expr"] for rule in rules())])
def test_queries_name_metrics_and_labels_that_are_exported(query: str, exported: dict[str, set[str]]) -> None:
    assert names_in(query)
    assert names_in(query) <= exported.keys()
    assert labels_in(query) <= SCRAPE_LABELS.union(*(exported[name] for name in names_in(query)))


def test_a_query_for_something_else_would_be_noticed(exported: dict[str, set[str]]) -> None:
    query = 'sum by (colour) (rate(vllm:generation_tokens{model_name="m"}[5m]))'  # the sample is called ..._total
    assert names_in(query) - exported.keys() == {"vllm:generation_tokens"}
    assert labels_in(query) == {"colour", "model_name"}


def test_everything_exported_is_on_the_dashboard(exported: dict[str, set[str]]) -> None:
    asked = set().union(*map(names_in, dashboard_queries()))
    parts = ("_bucket", "_count", "_sum", "_created")
    measured = {name for name in exported if not name.endswith(parts)} - {"up"}
    # Said by others of the same panel: tokens looked up in the prefix cache, nodes by stage.
    left_out = {"vllm:prompt_tokens_total", "vllm:spec_decode_num_draft_tokens_total"}
    assert measured - asked == left_out
    assert {name.removesuffix("_bucket") for name in exported if name.endswith("_bucket")} <= {
        name.removesuffix("_bucket") for name in asked
    }


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_variables_that_queries_use_are_defined() -> None:
    defined = {variable["name"] for variable in dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$\{?(?!__)(\w+)", json.dumps(dashboard())))
    assert used == defined


def promtool(*arguments: str | Path) -> str:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_accepts_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    queries = [query.replace("$__rate_interval", "1m") for query in dashboard_queries()]
    recorded = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    assert f"{len(queries)} rules found" in promtool("check", "rules", tmp_path / "rules.yaml")


MODEL, ENGINE = 'model_name="m"', 'model_name="m", engine="e"'
QUIET = {
    f"paceline:targets{{{MODEL}}}": "1x60",
    'up{job="paceline"}': "1x60",
    f"vllm:num_requests_waiting{{{ENGINE}}}": "3x60",
    f"paceline:max_waiting{{{ENGINE}}}": "128x60",
    f"paceline:requests_refused_total{{{ENGINE}}}": "5x60",
    f"vllm:spec_decode_num_drafts_total{{{ENGINE}}}": "0+600x60",
    f"vllm:spec_decode_num_accepted_tokens_total{{{ENGINE}}}": "0+700x60",
    f'paceline:deadline_misses_total{{{ENGINE}, stage="medium"}}': "0+10x60",
    f'paceline:breakers_open{{{ENGINE}, stage="medium"}}': "0x8 1x3 0x49",  # a probe closes it after three minutes
    f'paceline:refused_trees_total{{{ENGINE}, stage="medium"}}': "2x60",
    f'paceline:steps_total{{{ENGINE}, rows="1"}}': "0+300x60",
    f'paceline:steps_total{{{ENGINE}, rows="4"}}': "0+300x60",
}
TROUBLE = {
    "PacelineNoTargetServes": {f"paceline:targets{{{MODEL}}}": "0x60"},
    "PacelineQueueGrows": {f"vllm:num_requests_waiting{{{ENGINE}}}": "0+2x60"},
    "PacelineQueueIsFull": {f"vllm:num_requests_waiting{{{ENGINE}}}": "128x60"},
    "PacelineRequestsAreRefused": {f"paceline:requests_refused_total{{{ENGINE}}}": "5x40 6x20"},
    "PacelineGuessesAreWrong": {f"vllm:spec_decode_num_accepted_tokens_total{{{ENGINE}}}": "0+30x60"},
    "PacelineDraftersAreLate": {f'paceline:deadline_misses_total{{{ENGINE}, stage="medium"}}': "0+60x60"},
    "PacelineWorkerIsLeftOut": {f'paceline:breakers_open{{{ENGINE}, stage="medium"}}': "0x30 1x30"},
    "PacelineTreesAreRefused": {f'paceline:refused_trees_total{{{ENGINE}, stage="medium"}}': "2x40 3x20"},
}


def test_every_rule_has_its_trouble() -> None:
    assert {rule["alert"] for rule in rules()} == TROUBLE.keys()


@pytest.mark.parametrize("trouble", [None, *TROUBLE])
def test_a_rule_fires_in_its_trouble_and_in_no_other(trouble: str | None, tmp_path: Path) -> None:
    series = QUIET | (TROUBLE[trouble] if trouble else {})
    firing = {
        "name": "which alerts fire",
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": "45m",
                "exp_samples": [{"labels": f'{{alertname="{trouble}"}}', "value": 1}] if trouble else [],
            }
        ],
    }
    test = {"rule_files": [str(DASHBOARDS / "alerts.yaml")], "evaluation_interval": "1m", "tests": [firing]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    promtool("test", "rules", tmp_path / "test.yaml")

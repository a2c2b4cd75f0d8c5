"""Statistics on numbers whose answer is known, and the tables made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import report, speeds, step_time


def records(factor: float = 2.0, runs: int = 3, prompts: int = 8) -> list[dict[str, Any]]:
    """Plain at 10 tokens/s, sssd at ``factor`` times that, run by run a bit faster on both; 20 tokens in 10 rounds."""
    settings = {
        "engines": ["plain", "sssd"],
        "baseline": ["plain"],
        "prompts_measured": prompts,
        "categories": 2,
        "max_tokens": 20,
        "dtype": "bf16",
        "runs": runs,
        "concurrencies": [1],
        "temperatures": [0.0],
    }
    made: list[dict[str, Any]] = [
        {"kind": "header", "settings": settings, "cpu": "a CPU", "cores": 2, "revision": "r", "date": "today"}
    ]
    for run in range(runs):
        for engine, speed in (("plain", 10.0 + run), ("sssd", factor * (10.0 + run))):
            cell = {"run": run, "engine": engine, "concurrency": 1, "temperature": 0.0}
            made += [
                {"kind": "answer", **cell, "prompt": prompt, "category": "ab"[prompt % 2], "tokens": 20}
                | {"seconds": 20 / speed, "rounds": 10 if engine == "sssd" else 20}
                for prompt in range(prompts)
            ]
            counters = {"steps": 10.0, "draft": 0.01, "forward": 0.1, "accept": 0.0, "other": 0.02}
            tokens = 20 * prompts
            made.append({"kind": "chunk", **cell, "tokens": tokens, "seconds": tokens / speed, "counters": counters})
        made.append({"kind": "memory", "engine": "sssd", "peak_rss_mb": 123 + run})
    made.append({"kind": "unavailable", "engine": "vllm", "reason": "no environment"})
    return made


def cell(summary: dict[str, Any], engine: str) -> dict[str, Any]:
    (found,) = [entry for entry in summary["cells"] if entry["engine"] == engine]
    return found


def test_speeds_are_medians_of_the_runs() -> None:
    found = cell(report.summarise(records()), "plain")
    assert found["runs"] == [10.0, 11.0, 12.0]
    assert found["tokens_per_s"] == 11.0


def test_a_steady_ratio_has_no_width() -> None:
    ratio = cell(report.summarise(records(factor=1.5)), "sssd")["ratios"]["plain"]
    assert (ratio["point"], ratio["low"], ratio["high"]) == (1.5, 1.5, 1.5)


def test_pairing_removes_what_the_runs_have_in_common() -> None:
    random = np.random.default_rng(1)
    shared = np.exp(random.normal(0, 1, (20, 5)))
    paired = speeds.paired_ratio(1.2 * shared, shared)
    assert paired.low == pytest.approx(1.2)
    assert paired.high == pytest.approx(1.2)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        noisy = np.exp(random.normal(np.log(1.3), 0.2, (24, 1)) + random.normal(0, 0.05, (24, 5)))
        found = speeds.paired_ratio(noisy, np.ones((24, 5)), seed)
        hits += found.low <= 1.3 <= found.high
    assert hits >= 34  # of 40; 95 % coverage gives fewer less than once in 100 times


def test_one_slow_run_hardly_moves_the_point() -> None:
    ours = np.full((10, 5), 2.0)
    ours[:, 4] = 0.2
    assert speeds.paired_ratio(ours, np.ones((10, 5))).point == pytest.approx(2.0)


def test_tokens_a_round_come_from_rounds_or_from_accepted_tokens() -> None:
    assert cell(report.summarise(records()), "sssd")["accepted_length"] == 2.0
    answers = [{"tokens": 20, "rounds": None}]
    assert speeds.accepted_length(answers, [{"counters": {"tokens": 20.0, "accepted": 5.0}}]) == pytest.approx(1.333)
    assert speeds.accepted_length(answers, [{"counters": {}}]) is None


def test_a_rounds_time_is_split_by_part() -> None:
    found = cell(report.summarise(records()), "sssd")["ms_per_round"]
    assert found == {"draft": 1.0, "verify": 10.0, "accept": 0.0, "overhead": 2.0}


def test_a_ratio_needs_prompts_that_both_have_measured() -> None:
    kept = [entry for entry in records() if not (entry["kind"] == "answer" and entry["engine"] == "plain")]
    assert cell(report.summarise(kept), "sssd")["ratios"] == {}


def test_the_summary_is_json_and_its_tables_name_everything() -> None:
    summary = json.loads(json.dumps(report.summarise(records())))
    text = report.markdown(summary)
    assert "| `sssd` | 22.0 | 2.00 (2.00 … 2.00) | 2.00 | 125 |" in text
    assert "* `vllm`: no environment" in text
    assert "22.0 (20.0 … 24.0)" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_differing_ids_stand_in_the_report() -> None:
    text = report.markdown(report.summarise([*records(), {"kind": "mismatch", "text": "prompt 3: sssd differs"}]))
    assert "prompt 3: sssd differs" in text


def test_the_readme_gets_the_table_between_its_markers_and_nothing_else_changes(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    summary = report.summarise(records())
    for _ in range(2):
        report.write_readme(readme, summary)
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench -->\n")
    assert text.endswith("\n<!-- /bench -->\nafter\n")
    assert "old" not in text
    assert text.count("| `sssd` |") == 1


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing here")
    with pytest.raises(ValueError, match="bench"):
        report.write_readme(readme, report.summarise(records()))


def test_the_report_is_made_anew_from_a_file_of_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in records()))
    assert report.main([str(file)]) == 0
    assert "`sssd`" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["memory_mb"] == {"sssd": 125}
    assert (tmp_path / "run.md").exists()


def test_steps_are_given_in_passes() -> None:
    parts = [{"pass": [4.0, 5.0], "steps": {"1": [6.0, 8.0]}, "kept": 0.75}]
    parts.append({"pass": [6.0], "steps": {"1": [7.0]}, "kept": 0.75})
    summary = step_time.summarise(step_time.join(parts))
    assert summary["pass_median_ms"] == 5.0
    assert summary["steps"][1]["ratio_of_medians"] == 1.4
    assert summary["steps"][1]["ratio_of_minima"] == 1.5
    assert "≤ 1.7" in step_time.table(summary)
    assert "75%" in step_time.table(summary)

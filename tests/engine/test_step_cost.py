"""The cost curve: measured, kept on disk, and believed only while it holds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from cluster.assemble import forget_curve
from cluster.engine import step_cost
from cluster.engine.step_cost import CostCurve, curve_path, kept_curve, load_curve, measure_steps


@pytest.fixture
def rank(make_model, make_rank):
    return make_rank(make_model("llama")[1], num_slots=2, capacity=160, scratch=32)


def test_a_curve_covers_all_widths_never_falls_and_gives_its_slot_back(rank):
    curve = measure_steps(rank, 32)
    assert (curve.rows[0], curve.rows[-1]) == (1, 32)
    assert curve.seconds[0] > 0
    for series in (curve.seconds, curve.slopes):
        assert len(series) == len(curve.rows)
        assert all(a <= b for a, b in pairwise(series))
    assert rank.kv.num_free == rank.kv.num_slots
    rank.kv.check()


def test_a_machine_that_was_busy_behind_long_contexts_does_not_make_short_ones_free(rank, monkeypatch):
    busy = {step_cost.contexts(160)[0]: 1.0, step_cost.contexts(160)[1]: 50.0}
    monkeypatch.setattr(step_cost, "_least_seconds", lambda rank, widths, context: [busy[context]] * len(widths))
    assert measure_steps(rank, 32).at(1, 0.0) == pytest.approx(0.5)


def test_context_is_paid_for_by_the_slope():
    curve = CostCurve((1, 4), (1.0, 2.0), (0.01, 0.02), context=50)
    assert curve.at(1) == curve.at(1, 50) == 1.0
    assert curve.at(4, 150) == pytest.approx(4.0)
    assert CostCurve((1, 4), (1.0, 2.0)).at(4, 1000) == 2.0


def test_every_session_but_the_first_reads_its_own_context():
    curve = CostCurve((1, 4), (1.0, 2.0), (0.01, 0.02), context=50, session_slope=0.005)
    assert curve.at(4, 150, 1) == pytest.approx(4.0)
    assert curve.at(4, 150, 3) == pytest.approx(4.0 + 2 * 150 * 0.005)
    assert curve.at(4) == curve.at(4, None, 3) == 2.0


@pytest.mark.parametrize(
    ("rows_cost", "reading", "free_rows"), [(0.25, 1.5, 0), (0.25, 0.0, 0), (0.0, 1.5, 0), (0.25, 1.5, 16)]
)
def test_what_reading_a_context_costs_is_told_from_what_its_rows_cost(rank, monkeypatch, rows_cost, reading, free_rows):
    def seconds(rank, widths, context):
        return [1e6 + context * (reading + rows_cost * max(0, width - free_rows)) for width in widths]

    monkeypatch.setattr(step_cost, "_least_seconds", seconds)
    assert measure_steps(rank, 32).session_slope == pytest.approx(reading, abs=1e-9)


def test_looks_go_on_as_long_as_they_find_something_faster(rank, monkeypatch):
    """An engine starts while much else does: what its first looks show is no price for as long as it lives."""
    clock, looks = [0.0], [0]

    def forward(batch):
        looks[0] += 1
        clock[0] += 1e-3 * (5.0 - 0.25 * looks[0] if looks[0] < 16 else 1.0)

    monkeypatch.setattr(step_cost.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(rank, "forward", forward)
    assert step_cost._least_seconds(rank, (1,), 8) == [pytest.approx(1e-3)]
    assert looks[0] == 16 + step_cost.QUIET_LOOKS


def test_a_kept_curve_is_read_back_while_it_holds(rank, tmp_path, monkeypatch):
    path = tmp_path / "curve.json"
    reports: list[str] = []
    first = kept_curve(rank, 32, path, reports.append)
    assert len(reports) == 1
    assert load_curve(path) == first
    monkeypatch.setattr(step_cost, "still_holds", lambda rank, curve: True)
    assert kept_curve(rank, 32, path, reports.append) == first
    assert len(reports) == 1
    kept_curve(rank, 16, path, reports.append)
    assert len(reports) == 2


def test_a_kept_curve_that_the_machine_contradicts_is_measured_anew(rank, tmp_path):
    path = tmp_path / "curve.json"
    curve = measure_steps(rank, 32)
    path.write_text(json.dumps(asdict(replace(curve, seconds=tuple(100 * s for s in curve.seconds)))))
    assert kept_curve(rank, 32, path).seconds[-1] < 50 * curve.seconds[-1]
    assert load_curve(path).seconds[-1] < 50 * curve.seconds[-1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": 1}', "\x00"])
def test_a_file_that_is_no_curve_is_as_good_as_none(tmp_path, text):
    path = tmp_path / "curve.json"
    assert load_curve(path) is None
    path.write_text(text)
    assert load_curve(path) is None


def test_the_path_tells_what_the_curve_depends_on(make_model, tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    folders = [make_model("llama")[1], make_model("qwen2")[1]]
    base = (folders[0], "bfloat16", "native", 2, 2048)
    others = [
        (folders[1], "bfloat16", "native", 2, 2048),
        (folders[0], "float32", "native", 2, 2048),
        (folders[0], "bfloat16", "torch", 2, 2048),
        (folders[0], "bfloat16", "native", 1, 2048),
        (folders[0], "bfloat16", "native", 2, 32),  # too short for what the others were measured behind
    ]
    assert curve_path(*base) == curve_path(*base[:-1], 8192)
    assert len({curve_path(*key) for key in [base, *others]}) == 6


def test_a_curve_that_cannot_be_kept_or_deleted_is_used_all_the_same(rank, tmp_path, caplog):
    (tmp_path / "file").touch()
    curve = kept_curve(rank, 4, tmp_path / "file" / "curve.json")  # as in a cache that is read-only, for root as well
    assert curve.rows[-1] == 4
    forget_curve(tmp_path)  # a folder is not deleted as a file
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]

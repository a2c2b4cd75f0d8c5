"""Lines at INFO are seen once, with time, level and name: in a process of its own, since logging is set up for good."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What Serve does in a replica, and Ray in none: a handler on `ray.serve` alone, replaced when options change.
SERVE = """
serve = logging.getLogger("ray.serve")
serve.setLevel(logging.INFO)
serve.propagate = False
def configure(form):
    serve.handlers.clear()
    serve.addHandler(logging.StreamHandler())
    serve.handlers[0].setFormatter(logging.Formatter(form))
configure("first %(levelname)s %(message)s")
"""
LINE = 'logging.getLogger("cluster.engine").info("ready"); logging.getLogger("elsewhere").info("chatter")'


def lines(*script: str) -> list[str]:
    """What a process writes to stderr."""
    code = "\n".join(("import logging", "from cluster.core.logs import *", *script))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def test_without_help_a_line_at_info_is_lost() -> None:
    assert lines(LINE) == []


@pytest.mark.parametrize("times", [1, 2])
def test_an_actor_writes_it_once_with_time_level_and_name(times: int) -> None:
    (line,) = lines(*["show_logs_in_actor()"] * times, LINE)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d [\d:,]+ INFO cluster\.engine: ready", line)


@pytest.mark.parametrize("times", [1, 2])
def test_a_replica_writes_it_once_in_serves_form(times: int) -> None:
    assert lines(SERVE, *["show_logs_in_replica()"] * times, LINE) == ["first INFO ready"]


def test_a_replica_follows_serve_where_it_is_configured_anew() -> None:
    assert lines(SERVE, "show_logs_in_replica()", 'configure("second %(message)s")', LINE) == ["second ready"]

"""`make clean`, `make stop` and `make status` beside a service: what they leave alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 2**22 + 1  # above every process id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose environment is older than what it is to have installed."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "asked: $*"\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def make(folder: Path, target: str) -> tuple[int, str]:
    done = subprocess.run(["make", target], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def run_by(folder: Path, pid: int) -> None:
    (folder / ".run").mkdir()
    (folder / ".run" / "state.json").write_text(json.dumps({"pid": pid, "born": "b", "port": 1, "dashboard": "d"}))


def test_clean_refuses_while_the_services_head_lives(folder: Path) -> None:
    run_by(folder, os.getpid())
    code, output = make(folder, "clean")
    assert code != 0
    assert "`make stop` first" in output
    assert (folder / ".run" / "state.json").exists()
    assert (folder / ".venv").exists()


@pytest.mark.parametrize("dead", [True, False], ids=["head is dead", "never run"])
def test_clean_cleans_where_no_head_lives(folder: Path, dead: bool) -> None:
    if dead:
        run_by(folder, NOBODY)
    code, output = make(folder, "clean")
    assert code == 0, output
    assert not (folder / ".run").exists()
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize("target", ["stop", "status"])
def test_stop_and_status_install_nothing(folder: Path, target: str) -> None:
    code, output = make(folder, target)
    assert code == 0, output
    assert "asked: -m deployments." in output
    assert "pip" not in output
    shutil.rmtree(folder / ".venv")
    code, output = make(folder, target)
    assert code != 0
    assert "nothing runs from this folder" in output
    assert not (folder / ".venv").exists()

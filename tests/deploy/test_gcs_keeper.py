"""The keeper starts a GCS that died again, as it was, and lets one rest that was stopped with its head."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL
from subprocess import Popen

import pytest

from deployments.gcs_keeper import GcsError, find_gcs, keep, running

PERSISTENT = {"RAY_gcs_storage": "rocksdb"}

Start = Callable[..., "Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that goes by the name of one of Ray's and only sleeps."""
    begun: list[Popen[bytes]] = []
    session = f"--session-name={tmp_path}"

    def start(program: str, *options: str, **environment: str) -> Popen[bytes]:
        path = tmp_path / program
        if not path.exists():
            path.symlink_to(Path(sys.executable).resolve())
        command = [str(path), "-c", "import time; time.sleep(300)", session, *options]
        begun.append(Popen(command, env=environment))
        assert within_seconds(lambda: any(folder.name == str(begun[-1].pid) for folder, _ in running(program)))
        return begun[-1]

    yield start
    for program in ("raylet", "gcs_server"):
        for folder, command in running(program):
            if session in command:
                with suppress(ProcessLookupError):
                    os.kill(int(folder.name), SIGKILL)
    for process in begun:
        process.wait()


def within_seconds(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def stop(process: Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_a_gcs_that_dies_is_started_again_as_it_was_until_the_head_is_stopped(start: Start) -> None:
    raylet = start("raylet")
    first = start("gcs_server", "--gcs_server_port=1", COLOUR="red", **PERSISTENT)
    gcs = find_gcs(1)
    assert gcs is not None
    assert (gcs.pid, gcs.environment) == (first.pid, {"COLOUR": "red", **PERSISTENT})
    keeper = threading.Thread(target=keep, args=(gcs,), daemon=True)
    keeper.start()

    stop(first)
    assert within_seconds(lambda: find_gcs(1) is not None)
    second = find_gcs(1)
    assert second is not None
    assert second.pid != gcs.pid
    assert (second.command, second.environment) == (gcs.command, gcs.environment)
    assert keeper.is_alive()

    stop(raylet)
    os.kill(second.pid, SIGKILL)
    keeper.join(timeout=60)
    assert not keeper.is_alive()
    assert find_gcs(1) is None


def test_a_gcs_that_keeps_its_state_in_memory_is_refused(start: Start) -> None:
    start("gcs_server", "--gcs_server_port=2")
    with pytest.raises(GcsError, match="RAY_gcs_storage=rocksdb"):
        find_gcs(2)


def test_another_ports_gcs_is_not_taken(start: Start) -> None:
    start("gcs_server", "--gcs_server_port=33", **PERSISTENT)
    assert find_gcs(3) is None

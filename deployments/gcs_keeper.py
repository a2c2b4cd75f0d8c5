"""Keeps the GCS of this host's Ray head alive: where its process dies, the same command starts it again.

    python -m deployments.gcs_keeper [--port 6379] [--wait 30]

Ray does not restart it by itself, and a cluster whose GCS stays away for a minute ends. For a head that was started
with ``RAY_gcs_storage=rocksdb`` and ``RAY_gcs_storage_path``: a GCS that keeps its state in memory would come back
empty. Nothing else of the cluster is touched, so requests in flight go on. `ray stop` ends the raylet first and the GCS
last: a GCS without a raylet is one that was stopped, and the keeper ends, too.
"""

from __future__ import annotations

import argparse
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.5
RESTART_PAUSE_S = 1.0  # a GCS that cannot start is not to be tried in a tight loop


class GcsError(Exception):
    """There is no GCS here that could be kept; the message says why."""


@dataclass(frozen=True, slots=True)
class Gcs:
    """A running ``gcs_server`` and how it was started."""

    pid: int
    command: tuple[str, ...]
    environment: dict[str, str]

    def wait(self) -> None:
        """Return once the process has ended; it need not be a child."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            select.select([descriptor], [], [])
        finally:
            os.close(descriptor)

    def again(self) -> Gcs:
        """A new process, started as this one was."""
        pid = subprocess.Popen(self.command, env=self.environment, start_new_session=True).pid
        return Gcs(pid, self.command, self.environment)

    def needed(self) -> bool:
        """Whether a raylet of its session runs here."""
        (session,) = [word for word in self.command if word.startswith("--session-name=")]
        return any(session in command for _, command in running("raylet"))


def find_gcs(port: int) -> Gcs | None:
    """The GCS that serves ``port``. Raises ``GcsError`` where it keeps nothing on disk."""
    for folder, command in running("gcs_server"):
        if f"--gcs_server_port={port}" not in command:
            continue
        environment = dict(entry.partition("=")[::2] for entry in _strings(folder / "environ"))
        if environment.get("RAY_gcs_storage") != "rocksdb":
            raise GcsError(
                f"the GCS (process {folder.name}) keeps its state in memory: start the head with "
                "RAY_gcs_storage=rocksdb RAY_gcs_storage_path=FOLDER"
            )
        return Gcs(int(folder.name), tuple(command), environment)
    return None


def keep(gcs: Gcs) -> None:
    """Start it again whenever it ends, until the head is stopped."""
    print(f"keeping the GCS, process {gcs.pid}", flush=True)
    while True:
        gcs.wait()
        if not gcs.needed():
            print("the head was stopped", flush=True)
            return
        gcs = gcs.again()
        print(f"the GCS had ended; it is process {gcs.pid} now", flush=True)
        time.sleep(RESTART_PAUSE_S)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--port", type=int, default=6379, help="the head's port (default: %(default)s)")
    parser.add_argument("--wait", type=float, default=30.0, help="seconds for a GCS to appear (default: %(default)s)")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.wait
    try:
        while (gcs := find_gcs(args.port)) is None:
            if time.monotonic() > deadline:
                raise GcsError(f"no GCS serves port {args.port} here")
            time.sleep(POLL_S)
        keep(gcs)
    except GcsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def running(program: str) -> Iterator[tuple[Path, list[str]]]:
    """(folder in /proc, command line) of this container's processes that run ``program``."""
    own_container = os.readlink("/proc/self/ns/pid")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = _strings(folder / "cmdline")
            if command and Path(command[0]).name == program and os.readlink(folder / "ns" / "pid") == own_container:
                yield folder, command
        except OSError:  # it ended a moment ago, or is another user's
            continue


def _strings(path: Path) -> list[str]:
    return path.read_bytes().decode(errors="surrogateescape").split("\0")[:-1]


if __name__ == "__main__":
    raise SystemExit(main())

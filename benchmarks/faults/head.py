"""A Ray cluster of a trial's own: free ports, a folder and a token of its own, its GCS on disk and kept alive.

Everything it started is ended by process id; any other Ray on the machine is left alone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.engines.base import session_members
from benchmarks.ports import free_ports
from deployments.gcs_keeper import find_gcs
from deployments.up import ONE_MACHINE_ENV

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 300.0
OBJECT_STORE_BYTES = 150 * 2**20
CPUS = 2


class HeadError(Exception):
    """The cluster did not start; the message says what was seen."""


class RayHead:
    """A head node and, with ``address``, one that other hosts reach. Close it in the end."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        # Short: Ray puts sockets into it, whose paths may not be long.
        self.folder = Path(tempfile.mkdtemp(prefix="plf-", dir="/tmp"))
        self.port, self.http_port, self.grpc_port, *rest = free_ports(7)
        self.environment = {
            **os.environ,
            **ONE_MACHINE_ENV,
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(self.folder / "gcs"),
            # Whatever else the machine does.
            "RAY_raylet_start_wait_time_s": "240",
            "RAY_worker_register_timeout_seconds": "240",
            "RAY_prestart_worker_first_driver": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.environment.pop("RAY_ADDRESS", None)
        self._address = address
        self._leaders: list[int] = []
        self._keeper: subprocess.Popen[bytes] | None = None
        names = (
            "--ray-client-server-port",
            "--dashboard-agent-listen-port",
            "--dashboard-port",
            "--object-manager-port",
        )
        options = [f"{name}={port}" for name, port in zip(names, rest)]
        if address != "127.0.0.1":
            options.append(f"--node-ip-address={address}")
        try:
            self.start_node(
                [
                    "--head",
                    f"--port={self.port}",
                    f"--temp-dir={self.folder}",
                    "--include-dashboard=false",
                    '--resources={"service": 8}',
                    *options,
                ],
                CPUS,
            )
            self._keep_gcs()
        except BaseException:
            self.close()
            raise

    @property
    def ray_address(self) -> str:
        return f"{self._address}:{self.port}"

    def start_node(self, options: Sequence[str], cpus: int, inside: Sequence[str] = ()) -> None:
        """`ray start`, its processes in a Unix session of their own. ``inside``: a command that runs it elsewhere.

        Raises ``HeadError`` with its output where it fails.
        """
        ray = str(Path(sys.executable).with_name("ray"))
        sizes = [f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        log = self.folder / f"start-{len(self._leaders)}.log"
        with log.open("wb") as out:
            started = subprocess.Popen(
                [*inside, ray, "start", *options, *sizes],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._leaders.append(started.pid)
        if started.wait(timeout=START_LIMIT_S) != 0:
            raise HeadError(f"`ray start` failed:\n{log.read_text()}")

    def call(self, module: str, data: str, limit_s: float = 600.0) -> str:
        """Run a module of this project as a driver of this cluster, ``data`` on its stdin; returns its last line.

        Raises ``HeadError`` with its output where it fails.
        """
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=data,
            env={**self.environment, "RAY_ADDRESS": self.ray_address},
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
        if done.returncode != 0:
            raise HeadError(f"{module} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return done.stdout.strip().splitlines()[-1]

    def gcs_pid(self) -> int:
        """0 while there is none."""
        gcs = find_gcs(self.port)
        return gcs.pid if gcs else 0

    def processes(self) -> dict[int, str]:
        """Every process of the cluster by id, with its title: Ray names its workers ``ray::CLASS.method``."""
        members = {pid for leader in self._leaders for pid in session_members(leader)} | {self.gcs_pid()}
        titles = {pid: _title(pid) for pid in members if pid}
        return {pid: title for pid, title in titles.items() if title}

    def named(self, title: str) -> list[int]:
        """Workers with this in their title, oldest first; while an actor is made, its name stands before it."""
        return sorted(pid for pid, own in self.processes().items() if own.startswith("ray::") and title in own)

    def close(self) -> None:
        """End every process of it. What hangs is ended, too."""
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.wait()
        members = {pid for leader in self._leaders for pid in session_members(leader)}
        for pid in (members | {self.gcs_pid()}) - {0}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keep_gcs(self) -> None:
        """The project's own keeper, as a head in service has it."""
        with (self.folder / "keeper.log").open("wb") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", "deployments.gcs_keeper", f"--port={self.port}"],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process does nothing meanwhile; its connections stay open."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def kill(pid: int) -> None:
    """`kill -9`, which no process can put off."""
    os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    return bool(_title(pid))


def resident_bytes(pid: int) -> int:
    """Anonymous memory in use, without pages shared with others; 0 where the process is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def wait_until(holds: Callable[[], bool], limit_s: float, what: str, poll_s: float = 0.1) -> float:
    """Seconds until it held. Raises ``TimeoutError`` naming ``what`` where it did not within ``limit_s``."""
    start = time.monotonic()
    while not holds():
        if time.monotonic() - start > limit_s:
            raise TimeoutError(f"not within {limit_s:.0f} s: {what}")
        time.sleep(poll_s)
    return time.monotonic() - start


def _title(pid: int) -> str:
    """The command line of a process that runs; empty for one that is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""

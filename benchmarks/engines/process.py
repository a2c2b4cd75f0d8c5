"""A worker seen from the comparison: started, asked, stopped by signal while others run, ended."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.engines import Family
from benchmarks.engines.base import Answer, Ask, Setup, Unavailable, peer_python, session_members

ROOT = Path(__file__).resolve().parents[2]
LOAD_TIMEOUT_S = 1800.0  # compiling a model on two slow cores takes minutes
ASK_TIMEOUT_S = 1800.0
END_TIMEOUT_S = 5.0
CLUSTER_END_TIMEOUT_S = 60.0  # it is taken down first
SETTLE_S = 2.0  # a cluster that was stopped catches up on health checks first


class Worker:
    """One process in a Unix session of its own. Every method but ``end`` raises ``Unavailable`` once it has failed."""

    def __init__(self, family: Family, setup: Setup, log: Path) -> None:
        self.family = family
        self.engines = setup.engines
        self.log = log
        self._left = b""
        self._stopped: list[int] = []
        module = importlib.import_module(f"benchmarks.engines.{family.module}")
        environment = module.environment(setup) if hasattr(module, "environment") else {}
        python = peer_python(setup.peers, family.peer) if family.peer else sys.executable
        command = [python, "-m", "benchmarks.engines.worker", "--engine", family.module]
        if not family.cluster:
            command.append("--dies-with-parent")
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                start_new_session=True,
            )
        self._send(asdict(setup))

    def load(self) -> dict[str, str]:
        """Wait until the engines are loaded; their versions."""
        reply = self._receive(LOAD_TIMEOUT_S)
        if "unavailable" in reply:
            raise Unavailable(reply["unavailable"])
        versions: dict[str, str] = reply["ready"]
        return versions

    def generate(self, ask: Ask) -> list[Answer]:
        fields = self._call({"generate": asdict(ask)})["answers"]
        return [Answer(**{**answer, "token_ids": tuple(answer["token_ids"])}) for answer in fields]

    def counters(self, engine: str) -> dict[str, float]:
        counters: dict[str, float] = self._call({"counters": engine})["counters"]
        return counters

    def probe(self) -> dict[str, Any]:
        probe: dict[str, Any] = self._call({"probe": True})["probe"]
        return probe

    def pause(self) -> None:
        """Stop every process of the engine; it costs no time while others run. Without effect once it has failed."""
        if self.family.cluster:
            with contextlib.suppress(Unavailable):
                self._stopped = self._processes()
                _signal_all(self._stopped, signal.SIGSTOP)
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)
        if self._stopped:
            _signal_all(self._stopped, signal.SIGCONT)
            self._stopped = []
            time.sleep(SETTLE_S)

    def peak_rss_mb(self) -> float:
        """Greatest resident size so far, summed over the engine's processes; shared pages count in each of them."""
        return sum(map(_peak_rss_mb, [*session_members(self._process.pid), *self._processes()]))

    def end(self) -> None:
        """Let it end by itself; kill its session where it does not."""
        with contextlib.suppress(BrokenPipeError):
            self._signal(signal.SIGCONT)
            _signal_all(self._stopped, signal.SIGCONT)
            if self._process.stdin:
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLUSTER_END_TIMEOUT_S if self.family.cluster else END_TIMEOUT_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _processes(self) -> list[int]:
        """The engine's processes outside the worker's session."""
        processes: list[int] = self._call({"processes": True})["processes"]
        return processes

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        self._send(request)
        reply = self._receive(ASK_TIMEOUT_S)
        if "error" in reply:
            raise Unavailable(f"{reply['error']}; see {self.log}")
        return reply

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Unavailable(f"the worker has ended; see {self.log}") from None

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._left:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise Unavailable(f"no answer within {timeout_s:.0f} s; see {self.log}")
            part = os.read(pipe, 1 << 16)
            if not part:
                raise Unavailable(f"the worker has ended; see {self.log}")
            self._left += part
        line, _, self._left = self._left.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def _signal_all(processes: Sequence[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _peak_rss_mb(process: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0

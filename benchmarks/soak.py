"""A long run with cancels, drafters' and targets' deaths mixed in: does anything stay behind that should have gone?

    python -m benchmarks.soak --requests 2000 [--out benchmarks/results/soak.json]

Starts Ray and a tiny service of its own. In the first half the small worker, the medium worker and the target are
killed, in the second half the medium worker again; every ninth client leaves in mid-stream. In the end nothing may be
held (KV slots, sessions, leases, actors, object references), no answer may differ, and over the second half no process
may have grown by 1 % per 1,000 requests. The last line is JSON; the exit status is 1 where something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults import load
from benchmarks.faults.catalogue import Strike, target_killed, worker_killed
from benchmarks.faults.head import resident_bytes, wait_until
from benchmarks.faults.service import Layout, Rig, running
from benchmarks.faults.trial import say
from benchmarks.provenance import provenance

CANCEL_EVERY = 9
STRIKES: tuple[tuple[float, str, Strike], ...] = (
    (0.08, "small worker killed", worker_killed("small")),
    (0.16, "medium worker killed", worker_killed("medium")),
    (0.24, "target killed", target_killed),
    (0.32, "small worker killed", worker_killed("small")),
    (0.70, "medium worker killed", worker_killed("medium")),
)
"""What is done after which share of the requests."""
SAMPLE_S = 2.0
SETTLE_LIMIT_S = 60.0
MOST_GROWTH = 0.01
"""Of a process' memory, per 1,000 requests."""
LEAST_SAMPLES = 10


@dataclass(frozen=True, slots=True)
class Sample:
    """A process' anonymous resident memory after so many requests."""

    requests: int
    bytes: int


class MemoryLog:
    """Notes the memory of every process of the cluster until it is stopped."""

    def __init__(self, rig: Rig, done: Callable[[], int]) -> None:
        self._rig = rig
        self._done = done
        self.samples: dict[int, list[Sample]] = defaultdict(list)
        self.names: dict[int, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            for pid, title in self._rig.head.processes().items():
                size = resident_bytes(pid)
                if size:
                    self.names[pid] = short(title)
                    self.samples[pid].append(Sample(self._done(), size))


def growth(samples: Sequence[Sample], since: int) -> float | None:
    """Relative growth per 1,000 requests by least squares over the samples from request ``since`` on; None where the
    process did not live through nearly all of that."""
    late = [sample for sample in samples if sample.requests >= since]
    if len(late) < LEAST_SAMPLES or samples[0].requests > since:
        return None
    requests = np.array([sample.requests for sample in late], dtype=np.float64)
    sizes = np.array([sample.bytes for sample in late], dtype=np.float64)
    if np.ptp(requests) == 0:
        return None
    slope = float(np.polyfit(requests, sizes, 1)[0])
    return 1000.0 * slope / float(sizes.mean())


def short(title: str) -> str:
    """Who a process is: Ray's own name of a worker without the method it is in, or else its program."""
    words = title.split()
    if title.startswith("ray::"):
        return words[0].partition(".")[0]
    program = Path(words[0]).name
    if not program.startswith("python"):
        return program
    return next((Path(word).name for word in words if word.endswith(".py")), program)


def soak(rig: Rig, requests: int) -> dict[str, Any]:
    """The run itself; its findings."""
    expected = load.undisturbed(rig.address)
    before = settled(rig)
    work = load.Load(rig.address, expected, say, cancel_every=CANCEL_EVERY)
    memory = MemoryLog(rig, lambda: len(work.answers))
    work.start()
    failures: list[str] = []
    try:
        for share, what, strike in STRIKES:
            work.wait_for(round(share * requests))
            say(f"{what}, after {len(work.answers)} requests")
            try:
                say(f"recovered after {strike(rig):.1f} s")
            except (TimeoutError, LookupError) as error:
                failures.append(f"{what}: {error}")
        for count in range(0, requests + 1, max(1, requests // 10)):
            work.wait_for(count)
            say(f"{len(work.answers)} requests")
        work.wait_for(requests)
    finally:
        work.stop()
        memory.stop()
    after = settled(rig, before)
    count = len(work.answers)
    growths = {
        f"{memory.names[pid]} ({pid})": round(found, 4)
        for pid, samples in memory.samples.items()
        if (found := growth(samples, count // 2)) is not None
    }
    failures += [f"{name} grew by {share:.1%} per 1,000" for name, share in growths.items() if share >= MOST_GROWTH]
    failures += [
        f"left behind: {name}: {after[name]}, was {before[name]}" for name in before if more(after, before, name)
    ]
    failures += [f"lost: {answer.error}" for answer in work.lost[:5]]
    failures += [f"request {answer.number} differs" for answer in work.differing[:5]]
    return {
        "requests": count,
        "cancelled": sum(answer.left for answer in work.answers),
        "lost": len(work.lost),
        "differing": len(work.differing),
        "growth_per_1000_requests": dict(sorted(growths.items(), key=lambda entry: -entry[1])),
        "before": before,
        "after": after,
        "failures": failures,
    }


def settled(rig: Rig, least: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the cluster holds once nobody asks for anything; waits for it to come down to ``least``."""
    with contextlib.suppress(TimeoutError):
        wait_until(rig.idle, SETTLE_LIMIT_S, "every slot and lease is given back")
    deadline = time.monotonic() + SETTLE_LIMIT_S
    while True:
        found = json.loads(rig.head.call("benchmarks.faults.census", ""))
        found["kv_slots"] = sum(target.kv_slots_used for target in rig.loads())
        found["requests"] = sum(target.running + target.waiting for target in rig.loads())
        found["leases"] = sum(sum(target.drafter_sessions.values()) for target in rig.loads())
        if time.monotonic() > deadline or not any(more(found, least or found, name) for name in found):
            return dict(found)
        time.sleep(2.0)


def more(found: dict[str, Any], before: dict[str, Any], name: str) -> bool:
    """Whether there is more of it than before; actors and sessions are counted by kind."""
    if isinstance(found[name], dict):
        return any(count > before[name].get(kind, 0) for kind, count in found[name].items())
    return bool(found[name] > before[name])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="at least (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the findings as a file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="plf-model-") as folder, running(Layout(), Path(folder)) as rig:
        findings = {**provenance(), **soak(rig, args.requests)}
    if args.out:
        args.out.write_text(json.dumps(findings, indent=1) + "\n")
    print(json.dumps(findings))
    return int(bool(findings["failures"]))


if __name__ == "__main__":
    raise SystemExit(main())

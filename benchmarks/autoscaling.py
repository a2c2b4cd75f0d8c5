"""Load up, drafters up; load gone, drafters gone: a trace of a real service whose draft stage scales by its leases.

    python -m benchmarks.autoscaling --out benchmarks/results/autoscaling.json

Deploys the service with 0 to 3 draft workers, sends waves of streams that ask for the stage, and notes streams and
replicas of drafters and target several times a second. With matplotlib installed, a plot beside the file. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import yaml

from benchmarks.engines.service import OwnCluster, cluster_environment
from benchmarks.provenance import provenance
from deployments import up
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

CONFIG = Path("deployments/configs/cpu.yaml")
SCALING = {
    "min_replicas": 0,
    "max_replicas": 3,
    "initial_replicas": 0,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 1.0,
    "downscale_delay_s": 4.0,
    "look_back_period_s": 2.0,
}
EVERY_S = 0.3


@dataclass(frozen=True, slots=True)
class Sample:
    seconds: float
    streams: int
    drafters: int
    targets: int


class Load:
    """Streams kept open: each ends and begins anew until fewer are wanted."""

    def __init__(self, address: str) -> None:
        self.wanted = self.running = self.finished = self.failed = 0
        self._stub = generation_pb2_grpc.GenerationStub(grpc.insecure_channel(address))
        self._lock = threading.Lock()

    def want(self, count: int) -> None:
        self.wanted = count
        while self.running < count:
            with self._lock:
                self.running += 1
            threading.Thread(target=self._stream, daemon=True).start()

    def _stream(self) -> None:
        request = pb.GenerateRequest(
            prompt="Tell me a long story about the sea.",
            sampling_params=pb.SamplingParams(temperature=1.0, max_tokens=200, ignore_eos=True),
            speculation=pb.Speculation(enabled=True, stages=["small"]),
        )
        while True:
            with self._lock:
                if self.running > self.wanted:
                    self.running -= 1
                    return
            try:
                last = list(self._stub.GenerateStream(request))[-1]
                self.finished += last.finish_reason == pb.FINISH_REASON_LENGTH
            except grpc.RpcError as error:
                print(f"a stream failed: {error.details()}", file=sys.stderr)
                self.failed += 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--waves", type=int, nargs="+", default=[0, 6, 0, 2, 0], help="streams at once, one after another"
    )
    parser.add_argument("--seconds", type=float, default=25.0, help="of a wave")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    os.environ.update(cluster_environment(Path(sys.executable).parent))
    out = args.out.resolve() if args.out else None
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(configuration(), file)
        file.flush()
        service = OwnCluster(Path(file.name))
    try:
        samples, load = trace(service, args.waves, args.seconds)
    finally:
        service.stop()
    for sample in samples:
        print(
            f"{sample.seconds:6.1f} s  {sample.streams} streams, {sample.drafters} drafters, {sample.targets} targets"
        )
    most = max(sample.drafters for sample in samples)
    result = {
        "most_drafters": most,
        "least_drafters_after": min(s.drafters for s in samples[[s.drafters for s in samples].index(most) :]),
        "targets": sorted({sample.targets for sample in samples}),
        "finished": load.finished,
        "failed": load.failed,
        "samples": [asdict(sample) for sample in samples],
        "settings": {"waves": args.waves, "seconds": args.seconds, "autoscaling_config": SCALING},
        **provenance(),
    }
    if out:
        out.write_text(json.dumps(result) + "\n")
        plot(samples, out.with_suffix(""))
    print(json.dumps(result))
    return int(load.failed > 0)


def configuration() -> dict[str, Any]:
    """The CPU configuration with one remote stage, which scales."""
    document: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    service, drafters = document["applications"]
    service["args"]["remote_stages"] = ["small"]
    small = next(stage for stage in drafters["args"]["stages"] if stage["name"] == "small")
    drafters["args"]["stages"] = [{**small, "deployment": {"autoscaling_config": SCALING}}]
    return document


def trace(service: OwnCluster, waves: list[int], seconds: float) -> tuple[list[Sample], Load]:
    load, samples, start = Load(service.address), list[Sample](), time.monotonic()
    for number, streams in enumerate(waves):
        load.want(streams)
        while time.monotonic() < start + (number + 1) * seconds:
            counts = replicas(service.dashboard)
            samples.append(
                Sample(round(time.monotonic() - start, 2), load.running, counts["Draft-small"], counts["Target"])
            )
            time.sleep(EVERY_S)
    return samples, load


def replicas(dashboard: str) -> dict[str, int]:
    """Running replicas by deployment."""
    states = up.applications(dashboard) or {}
    deployments = {name: info for state in states.values() for name, info in state.get("deployments", {}).items()}
    return {
        name: sum(replica["state"] == "RUNNING" for replica in deployments.get(name, {}).get("replicas", []))
        for name in ("Draft-small", "Target")
    }


def plot(samples: list[Sample], file: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 3.5))
    seconds = [sample.seconds for sample in samples]
    panel.fill_between(seconds, [s.streams for s in samples], step="post", alpha=0.2, label="streams")
    panel.step(seconds, [s.drafters for s in samples], where="post", label="draft workers")
    panel.step(seconds, [s.targets for s in samples], where="post", linestyle="--", label="targets")
    panel.set_xlabel("seconds")
    panel.legend()
    figure.tight_layout()
    figure.savefig(f"{file}.svg")


if __name__ == "__main__":
    raise SystemExit(main())

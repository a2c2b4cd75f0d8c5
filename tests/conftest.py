"""Fixtures for the whole suite: one local Ray cluster with Serve, started for the tests that ask for it."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which transformers does

ROOT = Path(__file__).resolve().parents[1]
SERVICERS = [
    "protos.generation_pb2_grpc.add_GenerationServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]
RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "OMP_NUM_THREADS": "1",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Using extra keyword arguments on `Field`:DeprecationWarning:ray")


@dataclass(frozen=True, slots=True)
class RayCluster:
    """Where Serve's doors are. Applications are deployed with ``serve.run``."""

    http_port: int
    grpc_port: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A cluster of this test run's own: own ports, folder and namespace, whatever else runs on the machine."""
    patch = pytest.MonkeyPatch()
    patch.delenv("RAY_ADDRESS", raising=False)
    for name, value in RAY_ENV.items():
        patch.setenv(name, value)

    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    cluster = RayCluster(free_port(), free_port())
    # Not pytest's own folder: its path is too long for the sockets Ray puts into it.
    folder = tempfile.mkdtemp(prefix="pl-", dir="/tmp")
    try:
        ray.init(
            address="local",
            num_cpus=8,
            object_store_memory=150 * 2**20,
            include_dashboard=False,
            namespace=f"test-{uuid.uuid4().hex[:8]}",
            log_to_driver="PACELINE_RAY_LOGS" in os.environ,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}},
            _temp_dir=folder,
        )
        serve.start(
            http_options=HTTPOptions(host="127.0.0.1", port=cluster.http_port),
            grpc_options=gRPCOptions(port=cluster.grpc_port, grpc_servicer_functions=SERVICERS),
        )
        yield cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        patch.undo()

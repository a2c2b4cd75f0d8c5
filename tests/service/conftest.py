"""The real service on a real Ray: the embedded default's weights, draft workers as actors, both doors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from service_rig import APP, DEADLINE_S, DRAFTERS, ENGINE, MODEL, RealService

from protos import generation_pb2_grpc


@pytest.fixture(scope="module")
def service(ray_cluster) -> Iterator[RealService]:  # type: ignore[no-untyped-def]
    from ray import serve

    from deployments.app import build_drafters, build_service

    stages = [
        {"name": "small", "drafter": "sssd", "lease_ttl_s": 10.0},
        {"name": "medium", "drafter": "swift", "options": {"passes": 2}, "lease_ttl_s": 10.0},
    ]
    serve.run(build_drafters({"target_model": MODEL, "stages": stages}), name=DRAFTERS, route_prefix=None)
    # A generous deadline: the drafters share two cores with the target, and only their tokens matter here.
    arguments = {
        "model": MODEL,
        "engine": {**ENGINE, "draft_deadline_steps": 100.0, "draft_deadline_max_ms": 1e3 * DEADLINE_S},
        "remote_stages": ["small", "medium"],
        "drafters_app": DRAFTERS,
    }
    serve.run(build_service(arguments), name=APP, route_prefix="/real")
    with grpc.insecure_channel(f"127.0.0.1:{ray_cluster.grpc_port}") as channel:
        ready = RealService(
            generation_pb2_grpc.GenerationStub(channel), f"http://127.0.0.1:{ray_cluster.http_port}/real"
        )
        wait_until_serving(channel)
        yield ready
    serve.delete(APP)
    serve.delete(DRAFTERS)


def wait_until_serving(channel: grpc.Channel) -> None:
    """Serve calls an application running up to a second before its ingress has heard from the target."""
    health = health_pb2_grpc.HealthStub(channel)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(grpc.RpcError):
            answer = health.Check(health_pb2.HealthCheckRequest(), metadata=(("application", APP),), timeout=5)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
        time.sleep(0.2)
    pytest.fail("the service does not call itself healthy")

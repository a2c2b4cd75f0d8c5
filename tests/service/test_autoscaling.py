"""Draft stages scale by leases, and by what their workers say: to three, to zero and back, the target untouched."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
from service_rig import MODEL

from deployments.autoscaling import replicas_for

APP = "scaled-drafters"


@pytest.mark.parametrize(
    ("sessions", "now", "overtaken", "busy", "wanted"),
    [
        (0, 3, {}, {}, 0),
        (1, 0, {}, {}, 1),  # woken from zero
        (5, 1, {}, {}, 3),
        (5, 3, {1: 0.0}, {1: 0.1}, 3),
        (2, 3, {1: 0.0, 2: 0.0}, {1: 0.1, 2: 0.2}, 1),
        (4, 2, {1: 0.3, 2: 0.2}, {1: 0.4, 2: 0.5}, 3),  # trees come late
        (4, 2, {1: 0.0, 2: 0.0}, {1: 0.95, 2: 1.0}, 3),  # no time left
        (2, 3, {1: 0.0}, {1: 0.7}, 2),  # enough to do, but a session has one worker
        (1, 1, {1: 0.5}, {1: 1.0}, 1),  # another worker could not help
        (0, 2, {1: 0.5}, {1: 1.0}, 0),
    ],
)
def test_replicas_wanted(
    sessions: float, now: int, overtaken: dict[int, float], busy: dict[int, float], wanted: int
) -> None:
    assert replicas_for(sessions, 2.0, now, overtaken, busy) == wanted


def eventually(holds: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.weights
def test_leases_bring_replicas_up_and_their_end_takes_all_of_them_away(ray_cluster) -> None:  # type: ignore[no-untyped-def]
    from ray import serve

    from cluster.core.types import tokenizer_hash
    from cluster.engine.weights import load_tokenizer, resolve_model
    from cluster.leases import RayDraftTransport
    from deployments.app import build_drafters

    scaling = {
        "min_replicas": 0,
        "max_replicas": 3,
        "initial_replicas": 0,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 2.0,
        "look_back_period_s": 1.5,
    }
    stage = {"name": "small", "drafter": "sssd", "deployment": {"autoscaling_config": scaling}}
    serve.run(build_drafters({"target_model": MODEL, "stages": [stage]}), name=APP, route_prefix=None)

    def replicas() -> int:
        states = serve.status().applications[APP].deployments["Draft-small"].replica_states
        return int(states.get("RUNNING", 0))

    def has(count: int) -> bool:
        return replicas() == count

    def all_ready(sessions: list[str]) -> bool:
        return all(transport.worker(session, "small") is not None for session in sessions)

    names = tokenizer_hash(load_tokenizer(resolve_model(MODEL["source"])).get_vocab())
    transport = RayDraftTransport("scaling", APP, ("small",), names)
    try:
        assert replicas() == 0
        for count in (6, 1):  # up from zero twice
            sessions = [f"s{count}-{index}" for index in range(count)]
            for session in sessions:
                transport.open(session, ("small",))
            assert eventually(partial(has, -(-count // 2)), 60.0), f"{replicas()} replicas for {count} sessions"
            assert eventually(partial(all_ready, sessions), 30.0)
            for session in sessions:
                transport.close(session)
            assert eventually(partial(has, 0), 60.0), f"{replicas()} replicas without a session"
    finally:
        transport.stop()
        serve.delete(APP)

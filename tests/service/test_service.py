"""The staged pipeline over real Ray actors, seen by real clients: exact, cancellable, and deaf to a drafter's death."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import openai
import pytest
from service_rig import DEADLINE_S, RealService

from protos import generation_pb2 as pb

pytestmark = [pytest.mark.weights, pytest.mark.cluster]

PROMPT = "Repeat this sentence three times: the quick brown fox jumps over the lazy dog near the river bank."
GREEDY = pb.SamplingParams(temperature=0.0, max_tokens=48)
LONG = pb.SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)  # for a medium stage to catch up in time
SAMPLED = pb.SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=48)
STAGES = ("small", "medium")


def eventually(holds: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_same_tokens_with_and_without_speculation(service: RealService, params: pb.SamplingParams) -> None:
    plain = service.stream(PROMPT, params, enabled=False)
    assert set(plain.origins) == {pb.ORIGIN_TARGET}
    assert plain.last.usage.completion_tokens == len(plain.token_ids)
    for stages in ((), ("small",), STAGES):
        drafted = service.stream(PROMPT, params, stages)
        assert (drafted.token_ids, drafted.text) == (plain.token_ids, plain.text)


def test_small_medium_and_target_are_processes_of_their_own_and_all_contribute(service: RealService) -> None:
    seen: set[int] = set()

    def contributed() -> bool:
        seen.update(service.stream(PROMPT, LONG, STAGES).origins)
        return seen == {pb.ORIGIN_TARGET, pb.ORIGIN_SMALL, pb.ORIGIN_MEDIUM}

    assert eventually(contributed, 60)
    pids = dict(service.load().worker_pids)
    assert set(pids) == {"target", "small", "medium"}
    assert len({*pids.values(), os.getpid()}) == 4


def test_a_resumed_stream_goes_on_identically(service: RealService) -> None:
    whole = service.stream(PROMPT, SAMPLED, enabled=False)
    for at in (1, 20, 47, 48):
        rest = service.stream(PROMPT, SAMPLED, STAGES, resume=whole.token_ids[:at])
        assert whole.token_ids[:at] + rest.token_ids == whole.token_ids
        assert whole.text.endswith(rest.text)


def test_killing_the_medium_worker_in_mid_stream_changes_nothing_but_speed(service: RealService) -> None:
    expected = service.stream(PROMPT, LONG, enabled=False)
    assert eventually(lambda: pb.ORIGIN_MEDIUM in service.stream(PROMPT, LONG, STAGES).origins, 60)
    victim = service.load().worker_pids["medium"]
    killed_at: list[float] = []

    def kill(count: int) -> None:
        if count >= 40 and not killed_at:
            os.kill(victim, signal.SIGKILL)
            killed_at.append(time.monotonic())

    disturbed = service.stream(PROMPT, LONG, STAGES, on_token=kill)
    meanwhile = service.stream(PROMPT, LONG, enabled=False)  # the worker's start shares the cores with the target
    assert killed_at
    assert (disturbed.token_ids, disturbed.text) == (expected.token_ids, expected.text)
    step = max(expected.gaps + meanwhile.gaps)  # a step with this machine's noise in it
    assert max(disturbed.gaps) <= DEADLINE_S + 10 * step  # a restart takes many times that
    revived = lambda: pb.ORIGIN_MEDIUM in service.stream(PROMPT, LONG, STAGES).origins  # noqa: E731
    assert eventually(revived, 30)
    assert service.load().worker_pids["medium"] != victim


def test_a_cancelled_stream_gives_its_slot_and_its_leases_back(service: RealService) -> None:
    params = pb.SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)
    call = service.call(prompt=PROMPT, sampling_params=params)
    next(call)
    assert service.load().kv_slots_used == 1
    call.cancel()  # type: ignore[attr-defined]
    assert eventually(lambda: service.load().kv_slots_used == 0, 10)
    assert eventually(lambda: sum(service.load().drafter_sessions.values()) == 0, 10)


def test_sessions_end_in_the_draft_workers_too(service: RealService) -> None:
    from ray import serve

    service.stream(PROMPT, GREEDY, STAGES)
    handle = serve.get_app_handle("real-drafters")

    def sessions() -> dict[str, int]:
        return dict(handle.sessions.remote().result(timeout_s=10))

    assert eventually(lambda: sessions() == {"small": 0, "medium": 0}, 15)


def test_openai_client_gets_the_same_text(service: RealService) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none")
    expected = service.stream(PROMPT, GREEDY, enabled=False)
    answer = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": PROMPT}], temperature=0, max_tokens=48
    )
    assert answer.choices[0].message.content == expected.text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected.token_ids)
    chunks = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        max_tokens=48,
        stream=True,
        extra_body={"speculation": {"stages": ["small", "medium"]}},
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text

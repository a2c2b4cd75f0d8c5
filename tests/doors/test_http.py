"""The HTTP door through real clients: httpx and the `openai` package."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from doors.conftest import MAX_MODEL_LEN, MODEL, Doors, eventually
from doors.fake_engine import VOCAB_SIZE, Mode, text_of
from prometheus_client.parser import text_string_to_metric_families

from deployments.codec import owner_of

pytestmark = pytest.mark.cluster


def post(doors: Doors, path: str = "completions", **body: Any) -> Any:
    return doors.http.post(f"/v1/{path}", json=body)


def events(doors: Doors, path: str = "completions", **body: Any) -> list[dict[str, Any]]:
    with doors.http.stream("POST", f"/v1/{path}", json={"stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def expected_tokens(prompt: list[int], seed: int, start: int, stop: int) -> list[int]:
    return [(sum(prompt) + seed + 7 * position) % VOCAB_SIZE for position in range(start, stop)]


def test_a_completion_carries_text_usage_seed_and_the_speculation_summary(doors: Doors) -> None:
    answer = post(doors, model=MODEL, prompt=[100, 101], max_tokens=7, seed=5).json()
    tokens = expected_tokens([100, 101], 5, 0, 7)
    choice = answer["choices"][0]
    assert choice["text"] == "".join(map(text_of, tokens))
    assert choice["token_ids"] == tokens
    assert choice["origins"] == ["small", "medium", "target"] * 2 + ["small"]
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "text_completion"
    assert answer["seed"] == 5
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 7,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert answer["speculation"] == {
        "rounds": 3,
        "drafted": 12,
        "accepted": 5,
        "mean_accepted_length": pytest.approx(7 / 3),
        "tokens_by_origin": {"small": 3, "medium": 2, "target": 2},
    }


def test_stream_chunks_join_to_the_whole_answer_and_only_the_first_has_the_seed(doors: Doors) -> None:
    body = {"prompt": "hello", "max_tokens": 8, "seed": 11}
    whole = post(doors, **body).json()
    chunks = events(doors, **body)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["choices"][0]["token_ids"]
    assert [choice["position"] for choice in choices] == [0, 3, 6]
    assert [chunk.get("seed") for chunk in chunks] == [11, None, None]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "length"]
    assert chunks[-1]["speculation"] == whole["speculation"]
    assert not any("usage" in chunk for chunk in chunks)


def test_priority_salt_owner_and_trace_reach_the_engine(doors: Doors) -> None:
    body = {"prompt": [int(Mode.ECHO)], "priority": 7, "cache_salt": "mine"}
    headers = {"Authorization": "Bearer secret", "traceparent": "00-ab-cd-01"}
    answer = doors.http.post("/v1/completions", json=body, headers=headers)
    owner = owner_of("Bearer secret", "mine")
    assert answer.json()["error"]["message"] == f"prompt: priority 7, salt 'mine', owner {owner!r}, trace '00-ab-cd-01'"
    assert post(doors, prompt=[int(Mode.ECHO)]).json()["error"]["message"].endswith("owner '', trace ''")


def test_metrics_are_vllms_by_name_where_it_has_them(doors: Doors) -> None:
    response = doors.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {
        (
            sample.name,
            *(value for name, value in sorted(sample.labels.items()) if name not in ("engine", "model_name")),
        ): sample
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert {sample.labels["model_name"] for sample in samples.values()} == {MODEL}
    values = {name: sample.value for name, sample in samples.items()}
    assert values["vllm:num_requests_running",] == 0
    assert values["vllm:prompt_tokens_total",] == 40
    assert values["vllm:spec_decode_num_draft_tokens_total",] == 8
    assert values["paceline:drafted_tokens_total", "medium"] == 3
    assert values["vllm:request_success_total", "stop"] == 2
    assert [values["vllm:time_to_first_token_seconds_bucket", bound] for bound in ("0.1", "1.0", "+Inf")] == [3, 3, 4]
    assert values["vllm:time_to_first_token_seconds_count",] == 4
    assert values["vllm:time_to_first_token_seconds_sum",] == 5.5
    assert values["paceline:steps_total", "4"] == 2
    assert values["paceline:mode", "local"] == 1
    per_position = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert [values[per_position, position] for position in ("0", "1")] == [4, 1]
    assert values["paceline:breakers_open", "medium"] == 1
    assert values["paceline:wasted_tokens_total", "medium"] == 40
    assert values["paceline:drafter_busy_seconds_total", "medium"] == 0.5
    assert [values["paceline:draft_age_seconds_bucket", bound, "medium"] for bound in ("0.01", "+Inf")] == [17, 20]
    assert values["paceline:node_choices_total", "all_pay"] == 2
    assert values["paceline:nodes_per_step_sum",] == 6.0


def test_include_usage_adds_one_chunk_without_choices(doors: Doors) -> None:
    chunks = events(doors, prompt="hello", max_tokens=6, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 6,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_without_a_seed_each_request_gets_its_own_and_learns_it(doors: Doors) -> None:
    first, second = (post(doors, prompt="hi", max_tokens=4).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    assert post(doors, prompt="hi", max_tokens=4, seed=first["seed"]).json()["choices"] == first["choices"]


def test_max_tokens_defaults_to_what_the_context_leaves(doors: Doors) -> None:
    answer = post(doors, prompt=[200] * (MAX_MODEL_LEN - 20)).json()
    assert answer["usage"]["completion_tokens"] == 20


def test_resumed_tokens_count_toward_max_tokens_and_positions(doors: Doors) -> None:
    body = {"prompt": [100], "max_tokens": 9, "seed": 1}
    whole = post(doors, **body).json()["choices"][0]["token_ids"]
    chunks = events(doors, **body, resume_token_ids=whole[:4])
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == whole[4:]
    assert chunks[0]["choices"][0]["position"] == 4


def test_speculation_can_be_turned_off(doors: Doors) -> None:
    answer = post(doors, prompt=[100], max_tokens=5, speculation={"enabled": False}).json()
    assert answer["speculation"]["tokens_by_origin"] == {"small": 0, "medium": 0, "target": 5}


def test_harmless_fields_and_neutral_values_of_unserved_ones_are_accepted(doors: Doors) -> None:
    extras = {"user": "u", "metadata": {}, "n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": None}
    assert post(doors, prompt="hi", max_tokens=1, **extras).status_code == 200


def test_the_client_chooses_the_request_id(doors: Doors) -> None:
    assert post(doors, prompt="hi", max_tokens=1, request_id="mine-1").json()["id"] == "mine-1"


def test_the_openai_client_completes_and_streams(doors: Doors) -> None:
    client = openai.OpenAI(base_url=f"{doors.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=6, seed=3)
    assert chat.choices[0].message.role == "assistant"
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 6
    streamed = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=6, seed=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(streamed)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == chat.choices[0].message.content
    assert chunks[-1].usage == chat.usage
    completion = client.completions.create(model=MODEL, prompt="hi", max_tokens=3, extra_body={"top_k": 5})
    assert completion.choices[0].finish_reason == "length"


def test_content_parts_of_text_and_the_developer_role_are_understood(doors: Doors) -> None:
    plain = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    odd = [{"role": "developer", "content": "be kind", "refusal": None}, {"role": "user", "content": parts}]
    answers = [post(doors, "chat/completions", messages=m, max_tokens=4, seed=1).json() for m in (plain, odd)]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_models_are_listed_and_looked_up(doors: Doors) -> None:
    client = openai.OpenAI(base_url=f"{doors.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="org/other"):
        client.models.retrieve("org/other")
    assert doors.http.get("/v1/models").json()["data"][0]["max_model_len"] == MAX_MODEL_LEN


def test_health_answers_and_unknown_paths_have_openais_error_shape(doors: Doors) -> None:
    assert doors.http.get("/health").json() == {"status": "serving"}
    missing, wrong_method = doors.http.get("/v1/nothing"), doors.http.get("/v1/completions")
    assert (missing.status_code, wrong_method.status_code) == (404, 405)
    assert set(missing.json()["error"]) == {"message", "type", "param", "code"}
    assert "/v1/nothing: Not Found; served: /v1/completions, /v1/chat/completions" in missing.json()["error"]["message"]


def test_a_full_queue_is_429_with_retry_after(doors: Doors) -> None:
    response = post(doors, prompt=[Mode.OVERLOADED], max_tokens=3)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["type"] == "rate_limit_error"
    client = openai.OpenAI(base_url=f"{doors.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL, prompt=[int(Mode.OVERLOADED)], max_tokens=3, stream=True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_500_with_the_request_id_and_no_detail(doors: Doors, stream: bool) -> None:
    response = post(doors, prompt=[Mode.BUG], max_tokens=3, request_id="req-7", stream=stream)
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert "req-7" in response.json()["error"]["message"]
    assert "secret" not in response.text
    assert "Traceback" not in response.text


def test_an_error_in_mid_stream_is_an_event_and_the_stream_still_ends(doors: Doors) -> None:
    chunks = events(doors, prompt=[Mode.LATE_BUG], max_tokens=9)
    assert chunks[-1]["error"]["type"] == "internal_server_error"
    assert "secret" not in json.dumps(chunks)


def test_timeout_s_ends_in_504_and_frees_the_session(doors: Doors) -> None:
    response = post(doors, prompt=[Mode.STUCK], max_tokens=3, timeout_s=0.3)
    assert response.status_code == 504
    assert response.headers["x-should-retry"] == "false"
    assert "0.3 s" in response.json()["error"]["message"]
    assert eventually(lambda: doors.running() == 0)


def test_a_client_that_leaves_in_mid_stream_frees_the_session(doors: Doors) -> None:
    body = {"prompt": [Mode.SLOW], "max_tokens": 500, "stream": True}
    with doors.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert doors.running() == 1
    assert eventually(lambda: doors.running() == 0, timeout_s=5.0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_frees_the_session(doors: Doors, stream: bool) -> None:
    body = {"prompt": [Mode.STUCK], "max_tokens": 500, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        doors.http.post("/v1/completions", json=body, timeout=0.5)
    assert eventually(lambda: doors.running() == 0, timeout_s=5.0)

"""Bad input over both doors: each kind has its status and a message that names the client's field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from doors.conftest import MAX_MODEL_LEN, Doors
from doors.fake_engine import VOCAB_SIZE
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from deployments.openai_api import IGNORED, UNSERVED, ChatBody, CompletionBody, GenerationBody
from protos import generation_pb2 as pb

pytestmark = pytest.mark.cluster

FULL = [200] * MAX_MODEL_LEN
USER = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True, slots=True)
class Bad:
    """One bad field: a JSON value, and how to put it into a protobuf request where its type allows it at all."""

    field: str
    value: Any
    param: str = ""  # where the error names a deeper field than the one set
    says: str = ""

    def __str__(self) -> str:
        return f"{self.field}={str(self.value)[:30]}"


BOTH = [
    Bad("temperature", -0.1),
    Bad("temperature", 101.0),
    Bad("top_p", -0.1),
    Bad("top_p", 1.5),
    Bad("top_k", -2),
    Bad("min_p", 1.01),
    Bad("max_tokens", 0),
    Bad("max_tokens", MAX_MODEL_LEN, says=f"{MAX_MODEL_LEN}"),
    Bad("min_tokens", 9),
    Bad("stop", [""]),
    Bad("stop", ["x"] * 17),
    Bad("stop_token_ids", [VOCAB_SIZE], param="stop_token_ids.0", says=f"[0, {VOCAB_SIZE})"),
    Bad("presence_penalty", 2.5),
    Bad("frequency_penalty", -2.5),
    Bad("repetition_penalty", 1e-38, says="[0.01, 2]"),
    Bad("logit_bias", {"5": 101.0}),
    Bad("logit_bias", {"999999": 1.0}, param="logit_bias.0"),
    Bad("timeout_s", 0.0),
    Bad("timeout_s", 61.0, says="60"),
    Bad("request_id", "x" * 129),
    Bad("request_id", "a\nb"),
    Bad("resume_token_ids", [VOCAB_SIZE], param="resume_token_ids.0"),
    Bad("resume_token_ids", [1, 2, 3, 4, 5, 6], says="max_tokens=5"),
    Bad("speculation", {"max_nodes": 257}, param="speculation.max_nodes"),
    Bad("speculation", {"stages": ["large"]}, param="speculation.stages", says="small, medium"),
    Bad("speculation", {"stages": ["medium"]}, param="speculation.stages", says="served: small"),
    Bad("prompt", "", says="empty"),
    Bad("cache_salt", "x" * 513),
]
HTTP_ONLY = [
    Bad("temperature", "hot", says=', got "hot"'),
    Bad("max_tokens", 1.5, says=", got 1.5"),
    Bad("max_tokens", "5"),
    Bad("seed", -(2**63) - 1),
    Bad("seed", 2**64),
    Bad("stream", "yes"),
    Bad("stop", [1]),
    Bad("logit_bias", {"x": 1.0}),
    Bad("prompt", [1, "a"]),
    Bad("prompt", 7),
    Bad("model", 7, says=", got 7"),
    Bad("prompt", ["one", "two"], says="2 prompts"),
    Bad("prompt", [-1], param="prompt.0"),
    Bad("prompt", [VOCAB_SIZE], param="prompt.0"),
    Bad("prompt", FULL, says=f"{MAX_MODEL_LEN} tokens"),
    Bad("prompt", None),
    Bad("stream_options", {"include_usage": True}, says="stream=true"),
    Bad("speculation", {"max_node": 3}, param="speculation.max_node"),
    Bad("resume_token_ids", "abc"),
    Bad("n", 2, says="2 is not served; allowed here: null or 1"),
    Bad("suffix", "x" * 10**6, says=f'"{"x" * 80}..." is not served'),
    Bad("best_of", 3),
    Bad("echo", True),
    Bad("logprobs", 1),
    Bad("suffix", "end"),
    Bad("priority", 2**31),
    Bad("priority", "high"),
    Bad("guided_json", {}, says="known:"),
]
CHAT_ONLY = [
    Bad("messages", []),
    Bad("messages", [{"role": "tool", "content": "x"}], param="messages.0.role", says="assistant"),
    Bad("messages", [{"content": "x"}], param="messages.0.role"),
    Bad("messages", [{"role": "user", "content": 5}], param="messages.0.content"),
    Bad("messages", [{"role": "user", "content": [{"type": "image_url"}]}], param="messages.0.content", says="text"),
    Bad("messages", [{"role": "user", "content": "x", "name": "bob"}], param="messages.0.name"),
    Bad("messages", [USER[0], {"role": "system", "content": "x"}], says="chat template"),
    Bad("max_completion_tokens", 0),
    Bad("tools", [{"type": "function"}], says="a list of 1 is not served"),
    Bad("response_format", {"type": "json_object"}, says='{"type": "text"}'),
    Bad("top_logprobs", 5),
    Bad("audio", {}),
    Bad("prompt", "x", says="known:"),
]


@pytest.mark.parametrize(
    ("params", "body"),
    [
        (chat_params.CompletionCreateParamsBase, ChatBody),
        (completion_params.CompletionCreateParamsBase, CompletionBody),
    ],
)
def test_every_field_of_openais_client_is_served_or_ignored_or_refused_as_not_served(
    params: type, body: type[GenerationBody]
) -> None:
    assert not params.__annotations__.keys() - body.model_fields.keys() - IGNORED - UNSERVED.keys()


def check_http(doors: Doors, path: str, body: dict[str, Any], bad: Bad) -> None:
    response = doors.http.post(f"/v1/{path}", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_argument"
    assert error["param"] == (bad.param or bad.field)
    assert error["message"].startswith(f"{error['param']}: ")
    assert bad.says in error["message"]


@pytest.mark.parametrize("bad", BOTH + HTTP_ONLY, ids=str)
def test_completions_refuse(doors: Doors, bad: Bad) -> None:
    body = {"prompt": "hi", "max_tokens": 5, bad.field: bad.value}
    check_http(doors, "completions", {name: value for name, value in body.items() if value is not None}, bad)


@pytest.mark.parametrize("bad", CHAT_ONLY, ids=str)
def test_chat_refuses(doors: Doors, bad: Bad) -> None:
    body = {"messages": USER, bad.field: bad.value}
    check_http(doors, "chat/completions", body, bad)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"prompt": NaN}',
        b'{"prompt": "\\ud800"}',
        b"\xff\xfe",
    ],
    ids=["empty", "broken", "no object", "NaN", "lone surrogate", "not UTF-8"],
)
def test_a_body_that_is_no_request_is_refused_as_body(doors: Doors, body: bytes) -> None:
    response = doors.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "body"


def test_a_body_that_is_too_large_is_413(doors: Doors) -> None:
    response = doors.http.post("/v1/completions", content=b'{"prompt": "' + b"x" * 2**22 + b'"}')
    assert response.status_code == 413
    assert response.json()["error"]["message"] == f"body: more than {4 * 2**20} bytes"


def test_a_bad_request_to_stream_gets_its_status_before_any_event(doors: Doors) -> None:
    response = doors.http.post("/v1/completions", json={"prompt": "hi", "top_p": 2.0, "stream": True})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"


def test_another_models_name_is_not_found(doors: Doors) -> None:
    response = doors.http.post("/v1/completions", json={"prompt": "hi", "model": "gpt-5"})
    assert response.status_code == 404
    assert "gpt-5" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "model"
    with pytest.raises(grpc.RpcError) as caught:
        doors.stub.Generate(pb.GenerateRequest(prompt="hi", model="gpt-5"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def grpc_request(bad: Bad) -> pb.GenerateRequest:
    request = pb.GenerateRequest(prompt="hi", sampling_params=pb.SamplingParams(max_tokens=5))
    holder: Any = request.sampling_params if bad.field in pb.SamplingParams.DESCRIPTOR.fields_by_name else request
    if bad.field == "logit_bias":
        holder.logit_bias.update({int(token): bias for token, bias in bad.value.items()})
    elif bad.field == "speculation":
        holder.speculation.CopyFrom(pb.Speculation(**bad.value))
    elif isinstance(bad.value, list):
        getattr(holder, bad.field).extend(bad.value)
    else:
        setattr(holder, bad.field, bad.value)
    return request


GRPC_ONLY = {
    "input": pb.GenerateRequest(),
    "prompt_token_ids": pb.GenerateRequest(prompt_token_ids=pb.TokenIds()),
    "prompt_token_ids.1": pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[1, VOCAB_SIZE])),
    "messages": pb.GenerateRequest(messages=pb.ChatMessages()),
    "messages.0.role": pb.GenerateRequest(messages=pb.ChatMessages(messages=[pb.ChatMessage(content="x")])),
    "top_p": pb.GenerateRequest(prompt="hi", sampling_params=pb.SamplingParams(top_p=float("nan"))),
    "temperature": pb.GenerateRequest(prompt="hi", sampling_params=pb.SamplingParams(temperature=float("inf"))),
    "timeout_s": pb.GenerateRequest(prompt="hi", timeout_s=float("nan")),
    "request": pb.GenerateRequest(prompt="x" * 2**22),
}


@pytest.mark.parametrize(
    ("param", "request_"),
    [pytest.param(bad.param or bad.field, grpc_request(bad), id=str(bad)) for bad in BOTH]
    + [pytest.param(param, request, id=param) for param, request in GRPC_ONLY.items()],
)
def test_grpc_refuses(doors: Doors, param: str, request_: pb.GenerateRequest) -> None:
    for call in (doors.stub.Generate, lambda request: list(doors.stub.GenerateStream(request))):
        with pytest.raises(grpc.RpcError) as caught:
            call(request_)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details().startswith(f"{param}: ")


def test_abort_without_an_id_is_refused(doors: Doors) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        doors.stub.Abort(pb.AbortRequest())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert json.dumps(caught.value.details()).startswith('"request_id: ')

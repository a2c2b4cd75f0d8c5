"""What the doors make of a request before it goes anywhere."""

from __future__ import annotations

import asyncio
import inspect
import json
from dataclasses import replace
from typing import Any

import pytest
from doors.conftest import byte_tokenizer

from cluster.core.errors import EngineUnavailable, InvalidArgument, NotFound
from cluster.core.types import ModelInfo
from cluster.tree_engine import check_request
from deployments.codec import MAX_MESSAGE, RESERVED_TEMPLATE_KWARGS, ClientRequest, Codec, public_message, status_of
from deployments.ingress_grpc import client_request
from deployments.openai_api import ChatBody, parse_body
from protos import generation_pb2 as pb

INFO = ModelInfo("model", "Llama", 10, 32, "float32", "torch", True, (), "hash")


def encode(priorities: bool = False, **asked: Any) -> Any:
    tokenizer: Any = None
    return asyncio.run(Codec(tokenizer, 60.0, priorities).encode(ClientRequest(**asked), INFO))


def test_a_request_is_for_the_model_it_was_encoded_for() -> None:
    request = encode(token_ids=(1, 2, 3))
    check_request(request, INFO)
    for other in (replace(INFO, model="its successor"), replace(INFO, tokenizer_hash="another")):
        with pytest.raises(EngineUnavailable, match="another model"):
            check_request(request, other)


def test_a_prompt_that_is_too_long_is_not_looked_at_token_by_token() -> None:
    with pytest.raises(InvalidArgument, match="33 tokens leave no room"):
        encode(token_ids=(99,) * 33)


@pytest.mark.parametrize("priority", [-1, 1])
def test_a_priority_is_taken_only_where_the_service_is_told_to(priority: int) -> None:
    assert encode(priorities=True, token_ids=(1,), priority=priority).priority == priority
    assert encode(token_ids=(1,), priority=0).priority == 0
    with pytest.raises(InvalidArgument, match=f"priority: {priority}: needs engine.priorities") as caught:
        encode(token_ids=(1,), priority=priority)
    assert status_of(caught.value).http == 400


def test_a_drawn_seed_survives_clients_whose_numbers_are_doubles() -> None:
    seeds = {encode(token_ids=(1,)).params.seed for _ in range(50)}
    assert len(seeds) == 50
    assert all(int(float(seed)) == seed for seed in seeds)


def test_top_p_0_leaves_the_best_token() -> None:
    best, one = (encode(token_ids=(1,), params={"seed": 5, **cut}).params for cut in ({"top_p": 0}, {"top_k": 1}))
    assert best == one
    assert encode(token_ids=(1,), params={"seed": 5, "top_p": 0.0, "top_k": 40}).params == one
    with pytest.raises(InvalidArgument, match="top_k"):
        encode(token_ids=(1,), params={"top_p": 0.0, "top_k": -2})


def test_a_negative_seed_is_taken_modulo_2_to_the_64() -> None:
    for seed, taken in ((-1, 2**64 - 1), (-(2**63), 2**63), (0, 0), (2**64 - 1, 2**64 - 1)):
        assert encode(token_ids=(1,), params={"seed": seed}).params.seed == taken
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(InvalidArgument, match="seed"):
            encode(token_ids=(1,), params={"seed": seed})


def test_what_a_client_wrote_comes_back_shortened() -> None:
    with pytest.raises(NotFound) as caught:
        encode(token_ids=(1,), model="x" * 100_000)
    assert len(public_message(caught.value, "id")) <= MAX_MESSAGE + 4
    assert public_message(InvalidArgument("seed", "is odd"), "id") == "seed: is odd"


CHAT_INFO = replace(INFO, vocab_size=300, max_model_len=300)


def chat(**fields: Any) -> Any:
    """The tokens of a chat's prompt, from HTTP's body on, as text."""
    tokenizer = byte_tokenizer()
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    asked = parse_body(ChatBody, body).client_request()
    return tokenizer.decode(asyncio.run(Codec(tokenizer, 60.0).encode(asked, CHAT_INFO)).prompt_token_ids)


def test_a_developer_is_what_templates_call_system() -> None:
    """Over either door: both hand over roles as the client wrote them."""
    tokenizer, codec = byte_tokenizer(), Codec(byte_tokenizer(), 60.0)
    for role in ("system", "developer"):
        grpc_asked = client_request(
            pb.GenerateRequest(messages=pb.ChatMessages(messages=[pb.ChatMessage(role=role, content="x")]))
        )
        prompt = asyncio.run(codec.encode(grpc_asked, CHAT_INFO)).prompt_token_ids
        assert tokenizer.decode(prompt) == chat(messages=[{"role": role, "content": "x"}])
        assert "system" in tokenizer.decode(prompt)


def test_a_templates_own_switch_is_reached_by_chat_template_kwargs() -> None:
    assert chat(chat_template_kwargs={"enable_thinking": False}) == chat() + "<think></think>"
    for thinking in ({"enable_thinking": True, "style": "brief", "budget": 7}, {}, None):
        assert chat(chat_template_kwargs=thinking) == chat()


def test_grpc_has_chat_template_kwargs_beside_the_messages() -> None:
    messages = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    assert client_request(pb.GenerateRequest(messages=messages)).chat_template_kwargs == {}
    kwargs = {"enable_thinking": False, "budget": 7, "share": 0.5, "style": "brief"}
    messages.chat_template_kwargs.update(kwargs)
    asked = client_request(pb.GenerateRequest(messages=messages))
    assert asked.chat_template_kwargs == kwargs
    assert str(asked.chat_template_kwargs["budget"]) == "7"
    tokenizer = byte_tokenizer()
    prompt = asyncio.run(Codec(tokenizer, 60.0).encode(asked, CHAT_INFO)).prompt_token_ids
    assert tokenizer.decode(prompt) == chat(chat_template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({str(i): i for i in range(17)}, "chat_template_kwargs"),
        (["enable_thinking"], "chat_template_kwargs"),
        ({"tools": "x"}, "chat_template_kwargs.tools"),
        ({"x": None}, "chat_template_kwargs.x"),
        ({"x": {"y": 1}}, "chat_template_kwargs.x"),
        ({"x": "x" * 1025}, "chat_template_kwargs.x"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_chat_template_kwargs_are_refused_by_name(kwargs: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        chat(chat_template_kwargs=kwargs)
    assert caught.value.field == field


def test_whatever_the_tokenizer_takes_for_itself_is_reserved() -> None:
    own = inspect.signature(byte_tokenizer().apply_chat_template).parameters
    assert set(own) - {"kwargs"} <= RESERVED_TEMPLATE_KWARGS


def test_no_reasoning_effort_is_ignored() -> None:
    assert chat(reasoning_effort=None) == chat()
    for effort in ("none", "high"):
        with pytest.raises(InvalidArgument, match=r"reasoning_effort: .*chat_template_kwargs"):
            chat(reasoning_effort=effort)

"""The gRPC door through generated stubs, and through nothing but server reflection."""

from __future__ import annotations

import threading
from typing import Any

import grpc
import pytest
from doors.conftest import MAX_MODEL_LEN, MODEL, Doors, eventually
from doors.fake_engine import VOCAB_SIZE, Mode, text_of
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from deployments.codec import owner_of
from protos import generation_pb2 as pb

pytestmark = pytest.mark.cluster


def ask(*prompt: int, **fields: Any) -> pb.GenerateRequest:
    params = fields.pop("sampling_params", pb.SamplingParams(max_tokens=7, seed=5))
    return pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=prompt), sampling_params=params, **fields)


def long(mode: Mode, **fields: Any) -> pb.GenerateRequest:
    return ask(mode, sampling_params=pb.SamplingParams(max_tokens=500, seed=5), **fields)


def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_generate_answers_whole(doors: Doors) -> None:
    answer = doors.stub.Generate(ask(100, 101, request_id="mine"))
    tokens = [(201 + 5 + 7 * position) % VOCAB_SIZE for position in range(7)]
    assert answer.text == "".join(map(text_of, tokens))
    assert list(answer.token_ids) == tokens
    assert list(answer.origins) == [pb.ORIGIN_SMALL, pb.ORIGIN_MEDIUM, pb.ORIGIN_TARGET] * 2 + [pb.ORIGIN_SMALL]
    assert (answer.request_id, answer.model, answer.seed) == ("mine", MODEL, 5)
    assert answer.finish_reason == pb.FINISH_REASON_LENGTH
    assert answer.usage == pb.Usage(prompt_tokens=2, completion_tokens=7, total_tokens=9, cached_tokens=1)
    assert answer.speculation == pb.SpeculationStats(
        rounds=3, drafted=12, accepted=5, mean_accepted_length=7 / 3, tokens_small=3, tokens_medium=2, tokens_target=2
    )


def test_the_stream_is_the_same_answer_in_items(doors: Doors) -> None:
    answer = doors.stub.Generate(ask(100, 101))
    items = list(doors.stub.GenerateStream(ask(100, 101)))
    assert [token for item in items for token in item.token_ids] == list(answer.token_ids)
    assert "".join(item.text for item in items) == answer.text
    assert [item.position for item in items] == [0, 3, 6]
    assert [item.HasField("seed") for item in items] == [True, False, False]
    assert [item.HasField("usage") for item in items] == [False, False, True]
    assert items[-1].speculation == answer.speculation
    assert items[-1].finish_reason == pb.FINISH_REASON_LENGTH


def test_text_and_chat_prompts_are_tokenised_by_the_server(doors: Doors) -> None:
    params = pb.SamplingParams(max_tokens=1)
    text = doors.stub.Generate(pb.GenerateRequest(prompt="hello", sampling_params=params))
    assert text.usage.prompt_tokens == 5
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hello")])
    answer = doors.stub.Generate(pb.GenerateRequest(messages=chat, sampling_params=params))
    assert answer.usage.prompt_tokens == len("<user\nhello>\n<assistant\n")


def test_resume_goes_on_where_the_client_stopped(doors: Doors) -> None:
    whole = list(doors.stub.Generate(ask(100)).token_ids)
    items = list(doors.stub.GenerateStream(ask(100, resume_token_ids=whole[:4])))
    assert [token for item in items for token in item.token_ids] == whole[4:]
    assert items[0].position == 4


def test_resume_with_the_whole_output_tells_why_it_ended(doors: Doors) -> None:
    whole = list(doors.stub.Generate(ask(100)).token_ids)
    answer = doors.stub.Generate(ask(100, resume_token_ids=whole))
    assert not answer.token_ids
    assert answer.finish_reason == pb.FINISH_REASON_LENGTH


def test_reflection_is_enough_for_a_client(doors: Doors) -> None:
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(doors.channel))
    service = pool.FindServiceByName("paceline.v1.Generation")
    method = service.FindMethodByName("GenerateStream")
    request = GetMessageClass(method.input_type)(prompt="hello")
    request.sampling_params.max_tokens = 4
    call = doors.channel.unary_stream(
        f"/{service.full_name}/{method.name}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    assert sum(len(item.token_ids) for item in call(request)) == 4


def test_model_info_tells_what_is_served(doors: Doors) -> None:
    info = doors.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model, info.vocab_size, info.max_model_len) == (MODEL, VOCAB_SIZE, MAX_MODEL_LEN)
    assert list(info.stages) == ["small"]
    assert info.row_invariant


def test_load_names_each_replica_and_its_process(doors: Doors) -> None:
    (replica,) = doors.stub.GetLoad(pb.GetLoadRequest()).replicas
    assert replica.replica
    assert replica.worker_pids["target"] > 0
    assert replica.stats.prompt_tokens == 40
    assert dict(replica.stats.drafted) == {"small": 5, "medium": 3}
    assert replica.governor.mode == "local"
    assert dict(replica.governor.rows) == {1: 7, 4: 2}
    assert replica.governor.expected_tokens_per_s == 120.0
    assert dict(replica.governor.choices) == {"all_pay": 2, "nothing_offered": 7}
    assert (list(replica.governor.nodes.counts), replica.governor.nodes.total) == ([7, 2, 0], 6.0)
    assert list(replica.stats.accepted_per_pos) == [4, 1]
    medium = replica.stages["medium"]
    assert (medium.breakers_open, medium.late_trees, medium.refused_trees, medium.wasted_nodes) == (1, 3, 2, 40)
    assert list(medium.draft_age.counts) == [17, 3]


def test_priority_salt_owner_and_trace_reach_the_engine(doors: Doors) -> None:
    request = pb.GenerateRequest(
        prompt_token_ids=pb.TokenIds(ids=[Mode.ECHO]),
        priority=-3,
        cache_salt="mine",
        sampling_params=pb.SamplingParams(),
    )
    key = (("authorization", "Bearer secret"), ("traceparent", "00-ab-cd-01"))
    said = f"priority -3, salt 'mine', owner '{owner_of('Bearer secret', 'mine')}', trace '00-ab-cd-01'"
    for call in (doors.stub.Generate, lambda *args, **kwargs: list(doors.stub.GenerateStream(*args, **kwargs))):
        with pytest.raises(grpc.RpcError, match=said):
            call(request, metadata=key)


def test_a_cancelled_stream_frees_the_session(doors: Doors) -> None:
    call = doors.stub.GenerateStream(long(Mode.SLOW))
    next(call)
    assert doors.running() == 1
    call.cancel()
    assert eventually(lambda: doors.running() == 0, timeout_s=5.0)


@pytest.mark.parametrize("mode", [Mode.SLOW, Mode.STUCK])
def test_a_clients_deadline_frees_the_session(doors: Doors, mode: Mode) -> None:
    code, _ = failure(lambda: list(doors.stub.GenerateStream(long(mode), timeout=0.5)))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert eventually(lambda: doors.running() == 0, timeout_s=5.0)


def test_timeout_s_is_a_deadline_that_the_server_keeps(doors: Doors) -> None:
    for call in (doors.stub.Generate, lambda request: list(doors.stub.GenerateStream(request))):
        code, details = failure(lambda call=call: call(long(Mode.STUCK, timeout_s=0.3)))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "0.3 s" in details
    assert eventually(lambda: doors.running() == 0, timeout_s=5.0)


def test_abort_ends_a_request_from_another_connection(doors: Doors) -> None:
    outcome: list[tuple[grpc.StatusCode, str]] = []
    request = long(Mode.SLOW, request_id="to-abort")
    reader = threading.Thread(target=lambda: outcome.append(failure(lambda: doors.stub.Generate(request))))
    reader.start()
    assert eventually(lambda: doors.running() == 1)
    assert doors.stub.Abort(pb.AbortRequest(request_id="to-abort")).aborted
    reader.join(timeout=10)
    assert outcome[0][0] is grpc.StatusCode.CANCELLED
    assert "to-abort" in outcome[0][1]
    assert not doors.stub.Abort(pb.AbortRequest(request_id="to-abort")).aborted


@pytest.mark.parametrize(
    ("mode", "code"),
    [
        (Mode.OVERLOADED, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Mode.BUG, grpc.StatusCode.INTERNAL),
        (Mode.FAIL_STEP, grpc.StatusCode.INTERNAL),
        (Mode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE),
        (Mode.REFUSE, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_the_engines_errors_have_their_own_codes(doors: Doors, mode: Mode, code: grpc.StatusCode) -> None:
    for call in (doors.stub.Generate, lambda request: list(doors.stub.GenerateStream(request))):
        got, details = failure(lambda call=call: call(ask(mode, request_id="req-7")))
        assert got is code
        assert "secret" not in details
        assert "Traceback" not in details
        assert code is not grpc.StatusCode.INTERNAL or "req-7" in details


def test_an_error_in_mid_stream_comes_after_the_items_before_it(doors: Doors) -> None:
    call = doors.stub.GenerateStream(ask(Mode.LATE_BUG))
    # One item from each of the two engines that the request fails.
    assert [next(call).position, next(call).position] == [0, 3]
    code, details = failure(lambda: next(call))
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in details


def test_health_check_watch_and_list_agree(doors: Doors) -> None:
    serving = health_pb2.HealthCheckResponse.SERVING
    for service in ("", "paceline.v1.Generation"):
        assert doors.health.Check(health_pb2.HealthCheckRequest(service=service)).status == serving
    watch = doors.health.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == serving
    watch.cancel()
    statuses = doors.health.List(health_pb2.HealthListRequest()).statuses
    assert {name: answer.status for name, answer in statuses.items()} == {
        "": serving,
        "paceline.v1.Generation": serving,
    }


def test_health_of_an_unknown_service_is_not_found(doors: Doors) -> None:
    code, details = failure(lambda: doors.health.Check(health_pb2.HealthCheckRequest(service="nope")))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "nope" in details

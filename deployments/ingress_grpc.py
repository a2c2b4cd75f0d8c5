"""The gRPC door: ``paceline.v1.Generation`` and ``grpc.health.v1.Health``, as methods that Serve dispatches to.

Serve picks a method by the last segment of the RPC's path, so the names below are the RPCs' names. A unary method
answers an error by setting the status on the context; a stream has to raise, since Serve carries the context to the
proxy only with an item or with an exception.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, NoReturn

from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2
from ray.serve.grpc_util import RayServegRPCContext

from cluster.core.errors import InvalidArgument, NotFound, PacelineError, TooLarge
from cluster.core.stats import EngineStats, Load
from cluster.core.types import FinishReason, ModelInfo, Origin, Speculation, SpeculationStats, StreamItem
from deployments.codec import INTERNAL, MAX_REQUEST_BYTES, ClientRequest, public_message, status_of
from deployments.service import Answer, Service, Tally, Usage
from protos import generation_pb2 as pb

log = logging.getLogger("ray.serve")

HEALTH_SERVICES = ("", "paceline.v1.Generation")
FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}
ORIGINS = {
    Origin.TARGET: pb.ORIGIN_TARGET,
    Origin.SMALL: pb.ORIGIN_SMALL,
    Origin.MEDIUM: pb.ORIGIN_MEDIUM,
}


class GrpcDoor:
    """RPC methods. ``self.service`` is set by the deployment class that mixes this in."""

    service: Service

    async def Generate(self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext) -> pb.GenerateResponse:
        request_id = request.request_id
        try:
            resolved = await self.service.resolve(client_request(request, grpc_context.invocation_metadata()))
            request_id = resolved.request_id
            return answer_message(await self.service.collect(resolved), self.service.model)
        except Exception as error:
            _set_status(grpc_context, error, request_id)
            return pb.GenerateResponse()

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.StreamItem, None]:
        request_id = request.request_id
        try:
            resolved = await self.service.resolve(client_request(request, grpc_context.invocation_metadata()))
            request_id = resolved.request_id
            tally = Tally()
            async with aclosing(self.service.stream(resolved)) as items:
                async for item in items:
                    tally.add(item)
                    yield item_message(item, tally)
        except Exception as error:
            _raise_status(grpc_context, error, request_id)

    async def Abort(self, request: pb.AbortRequest, grpc_context: RayServegRPCContext) -> pb.AbortResponse:
        try:
            if not request.request_id:
                raise InvalidArgument("request_id", "is empty")
            return pb.AbortResponse(aborted=await self.service.targets.abort(request.request_id))
        except Exception as error:
            _set_status(grpc_context, error, request.request_id)
            return pb.AbortResponse()

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, grpc_context: RayServegRPCContext
    ) -> pb.GetModelInfoResponse:
        try:
            return info_message(self.service.info)
        except Exception as error:
            _set_status(grpc_context, error, "")
            return pb.GetModelInfoResponse()

    async def GetLoad(self, request: pb.GetLoadRequest, grpc_context: RayServegRPCContext) -> pb.GetLoadResponse:
        try:
            loads = await self.service.targets.loads()
            return pb.GetLoadResponse(replicas=[load_message(replica, load) for replica, load in loads])
        except Exception as error:
            _set_status(grpc_context, error, "")
            return pb.GetLoadResponse()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in HEALTH_SERVICES:
            _set_status(grpc_context, NotFound(f"service: {request.service!r} is not served here"), "")
            return health_pb2.HealthCheckResponse()
        return health_message(self.service.targets.serving)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        known = request.service in HEALTH_SERVICES
        async for serving in self.service.targets.watch():
            # The protocol wants a call for an unknown service kept open, not refused.
            yield (
                health_message(serving)
                if known
                else health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            )

    async def List(
        self, request: health_pb2.HealthListRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthListResponse:
        state = health_message(self.service.targets.serving)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(HEALTH_SERVICES, state))


def _set_status(context: RayServegRPCContext, error: Exception, request_id: str) -> None:
    status = status_of(error)
    if status is INTERNAL:
        log.error("request %r failed", request_id, exc_info=error)
    context.set_code(status.grpc)
    context.set_details(public_message(error, request_id))


def _raise_status(context: RayServegRPCContext, error: Exception, request_id: str) -> NoReturn:
    _set_status(context, error, request_id)
    # A fresh error: what was raised may not pickle, and its text may not be for clients.
    raise PacelineError(context.details()) from None


def client_request(request: pb.GenerateRequest, metadata: Sequence[tuple[str, str]] = ()) -> ClientRequest:
    """``metadata``: the call's. Raises ``InvalidArgument`` or ``TooLarge`` where the whole cannot be a request."""
    size = request.ByteSize()
    if size > MAX_REQUEST_BYTES:
        raise TooLarge(f"request: {size} bytes, at most {MAX_REQUEST_BYTES}")
    headers = dict(metadata)
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidArgument("input", "one of prompt, messages, prompt_token_ids is needed")
    speculation = request.speculation
    return ClientRequest(
        text=request.prompt if kind == "prompt" else None,
        messages=tuple((m.role, m.content) for m in request.messages.messages) if kind == "messages" else None,
        token_ids=tuple(request.prompt_token_ids.ids) if kind == "prompt_token_ids" else None,
        params=_params(request.sampling_params),
        speculation=Speculation(
            enabled=_optional(speculation, "enabled", True),
            max_nodes=_optional(speculation, "max_nodes", None),
            stages=tuple(speculation.stages) or None,
        ),
        resume_token_ids=tuple(request.resume_token_ids),
        timeout_s=_optional(request, "timeout_s", None),
        request_id=request.request_id,
        model=request.model,
        priority=request.priority,
        cache_salt=request.cache_salt,
        chat_template_kwargs=_template_kwargs(request.messages.chat_template_kwargs),
        authorization=headers.get("authorization", ""),
        trace_parent=headers.get("traceparent", ""),
    )


def _template_kwargs(struct: Struct) -> dict[str, Any]:
    """As JSON has them: a Struct knows no integers, but a template would write 7.0 where 7 is meant."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in struct.items()
    }


def _optional(message: Message, name: str, default: Any) -> Any:
    return getattr(message, name) if message.HasField(name) else default


def _params(message: pb.SamplingParams) -> dict[str, Any]:
    """Those fields the client set; names are those of ``cluster.core.types.SamplingParams``."""
    params: dict[str, Any] = {
        name: getattr(message, name)
        for name in (descriptor.name for descriptor in pb.SamplingParams.DESCRIPTOR.fields)
        if name not in ("stop", "stop_token_ids", "logit_bias") and message.HasField(name)
    }
    params["stop"] = tuple(message.stop)
    params["stop_token_ids"] = tuple(message.stop_token_ids)
    params["logit_bias"] = tuple(sorted(message.logit_bias.items()))
    return params


def item_message(item: StreamItem, tally: Tally) -> pb.StreamItem:
    last = item.finish_reason is not None
    return pb.StreamItem(
        request_id=item.request_id,
        token_ids=item.token_ids,
        origins=_origins(item.origins),
        position=item.position,
        text=item.text,
        seed=item.seed,
        finish_reason=FINISH_REASONS[item.finish_reason],
        usage=usage_message(tally.usage) if last else None,
        speculation=stats_message(tally.stats) if last else None,
    )


def answer_message(answer: Answer, model: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        request_id=answer.request_id,
        model=model,
        text=answer.text,
        token_ids=answer.token_ids,
        origins=_origins(answer.origins),
        seed=answer.seed,
        finish_reason=FINISH_REASONS[answer.finish_reason],
        usage=usage_message(answer.usage),
        speculation=stats_message(answer.stats),
    )


def _origins(origins: Sequence[Origin]) -> list[pb.Origin]:
    return [ORIGINS[origin] for origin in origins]


def usage_message(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        cached_tokens=usage.cached_tokens,
    )


def stats_message(stats: SpeculationStats) -> pb.SpeculationStats:
    return pb.SpeculationStats(
        rounds=stats.rounds,
        drafted=stats.drafted,
        accepted=stats.accepted,
        mean_accepted_length=stats.mean_accepted_length,
        tokens_small=stats.tokens_by_origin[Origin.SMALL],
        tokens_medium=stats.tokens_by_origin[Origin.MEDIUM],
        tokens_target=stats.tokens_by_origin[Origin.TARGET],
    )


def info_message(info: ModelInfo) -> pb.GetModelInfoResponse:
    return pb.GetModelInfoResponse(
        model=info.model,
        architecture=info.architecture,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        dtype=info.dtype,
        kernels=info.kernels,
        row_invariant=info.row_invariant,
        stages=info.stages,
        tokenizer_hash=info.tokenizer_hash,
    )


def load_message(replica: str, load: Load) -> pb.ReplicaLoad:
    return pb.ReplicaLoad(
        replica=replica,
        running=load.running,
        waiting=load.waiting,
        kv_slots_used=load.kv_slots_used,
        kv_slots_total=load.kv_slots_total,
        drafter_sessions=load.drafter_sessions,
        worker_pids=load.worker_pids,
        deadline_misses=load.deadline_misses,
        drafts_wanted=load.drafts_wanted,
        drafts_cached=load.drafts_cached,
        drafts_missing=load.drafts_missing,
        last_choice=load.last_choice,
        kv_usage=load.kv_usage,
        max_waiting=load.max_waiting,
        stats=engine_stats_message(load.stats),
        governor=pb.GovernorReport(**asdict(load.governor)),
        stages={name: pb.StageStats(**asdict(stats)) for name, stats in load.stages.items()},
    )


def engine_stats_message(stats: EngineStats) -> pb.EngineStats:
    """The counters; histograms of requests' times are in ``/metrics`` only."""
    counters = (descriptor.name for descriptor in pb.EngineStats.DESCRIPTOR.fields)
    return pb.EngineStats(**{name: getattr(stats, name) for name in counters})


def health_message(serving: bool) -> health_pb2.HealthCheckResponse:
    status = health_pb2.HealthCheckResponse
    return status(status=status.SERVING if serving else status.NOT_SERVING)

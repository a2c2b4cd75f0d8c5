"""The HTTP door: OpenAI's endpoints as a FastAPI application over ``Service``. ``openai_api`` has the bodies."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from cluster.core.errors import (
    Aborted,
    DeadlineExceeded,
    EngineFailed,
    EngineUnavailable,
    InvalidArgument,
    NotFound,
    Overloaded,
    TooLarge,
)
from cluster.core.types import GenerateRequest, StreamItem
from deployments.codec import INTERNAL, MAX_REQUEST_BYTES, public_message, status_of
from deployments.metrics import render
from deployments.openai_api import (
    ChatBody,
    CompletionBody,
    origins_json,
    parse_body,
    speculation_json,
    usage_json,
)
from deployments.service import Answer, Service, Tally

log = logging.getLogger("ray.serve")


def build_app(service: Service) -> FastAPI:
    """The application; its lifespan keeps the targets' state fresh."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.targets.start()
        yield
        await service.targets.stop()

    app = FastAPI(title="Paceline", openapi_url=None, lifespan=lifespan)
    started = int(time.time())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(service, request, CompletionBody)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(service, request, ChatBody)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model_json(service, started)]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        if model != service.model:
            return error_response(NotFound(f"model: {model!r} is not served here; served: {service.model}", "model"))
        return JSONResponse(model_json(service, started))

    @app.get("/health")
    async def health() -> Response:
        serving = service.targets.serving
        return JSONResponse({"status": "serving" if serving else "not serving"}, 200 if serving else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        body, content_type = render(service.model, await service.targets.loads())
        return Response(body, media_type=content_type)

    @app.exception_handler(HTTPException)
    async def routing_error(request: Request, error: Exception) -> Response:
        # Raised by the router only: an unknown path or a wrong method.
        assert isinstance(error, HTTPException)
        served = ", ".join(route.path for route in app.routes if isinstance(route, APIRoute))
        message = f"{request.method} {request.url.path}: {error.detail}; served: {served}"
        body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": body}, error.status_code, error.headers)

    return app


async def answer(service: Service, request: Request, kind: type[CompletionBody] | type[ChatBody]) -> Response:
    """One generation, streamed or whole; every error as OpenAI's error object."""
    request_id = ""
    try:
        body = parse_body(kind, await read_body(request))
        authorization, trace_parent = (request.headers.get(name, "") for name in ("authorization", "traceparent"))
        asked = replace(body.client_request(), authorization=authorization, trace_parent=trace_parent)
        resolved = await service.resolve(asked)
        request_id = resolved.request_id
        envelope = Envelope(kind, resolved, service.model)
        if body.stream:
            return await open_stream(service.stream(resolved), envelope, body.include_usage)
        return JSONResponse(envelope.whole(await service.collect(resolved)))
    except Exception as error:
        return error_response(error, request_id)


async def read_body(request: Request) -> bytes:
    """Raises ``TooLarge`` where more than ``MAX_REQUEST_BYTES`` arrive, ``Aborted`` where no more will."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_REQUEST_BYTES:
                raise TooLarge(f"body: more than {MAX_REQUEST_BYTES} bytes")
    except ClientDisconnect:
        raise Aborted("the client left before its request was whole") from None
    return bytes(body)


class Envelope:
    """The JSON around one answer: completion or chat, whole or in chunks."""

    def __init__(self, kind: type[CompletionBody] | type[ChatBody], request: GenerateRequest, model: str) -> None:
        self._chat = kind is ChatBody
        self._object = kind.endpoint
        self._head = {"id": request.request_id, "created": int(time.time()), "model": model}
        self._first = True

    def whole(self, answer: Answer) -> dict[str, Any]:
        message = {"message": {"role": "assistant", "content": answer.text}} if self._chat else {"text": answer.text}
        choice = {
            "index": 0,
            **message,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
            "token_ids": answer.token_ids,
            "origins": origins_json(answer.origins),
        }
        return {
            **self._head,
            "object": self._object,
            "choices": [choice],
            "usage": usage_json(answer.usage),
            "seed": answer.seed,
            "speculation": speculation_json(answer.stats),
        }

    def chunk(self, item: StreamItem, with_usage: bool) -> dict[str, Any]:
        """A chunk for one item. With ``include_usage`` OpenAI has ``usage: null`` in all chunks but the last."""
        text: dict[str, Any] = {"text": item.text}
        if self._chat:
            role = {"role": "assistant"} if self._first else {}
            text = {"delta": {**role, "content": item.text}}
        self._first = False
        choice = {
            "index": 0,
            **text,
            "logprobs": None,
            "finish_reason": item.finish_reason,
            "token_ids": item.token_ids,
            "origins": origins_json(item.origins),
            "position": item.position,
        }
        return {
            **self._chunk_head(),
            "choices": [choice],
            **({"usage": None} if with_usage else {}),
            **({} if item.seed is None else {"seed": item.seed}),
            **({} if item.finish_reason is None else {"speculation": speculation_json(item.stats)}),
        }

    def usage_chunk(self, tally: Tally) -> dict[str, Any]:
        return {**self._chunk_head(), "choices": [], "usage": usage_json(tally.usage)}

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": f"{self._object}.chunk" if self._chat else self._object}


class EventStream(StreamingResponse):
    """Server-sent events of one generation. Whatever ends the response closes the generation."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], items: AsyncGenerator[StreamItem, None]) -> None:
        # nginx would gather events into blocks
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._items = items

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._items.aclose()


async def open_stream(items: AsyncGenerator[StreamItem, None], envelope: Envelope, include_usage: bool) -> EventStream:
    """Wait for the first item, so that a request refused by the engine still gets its own HTTP status."""
    try:
        first = await anext(items)
    except BaseException:
        await items.aclose()
        raise
    return EventStream(_events(first, items, envelope, include_usage), items)


async def _events(
    first: StreamItem, items: AsyncGenerator[StreamItem, None], envelope: Envelope, include_usage: bool
) -> AsyncIterator[str]:
    tally = Tally()
    tally.add(first)
    yield _event(envelope.chunk(first, include_usage))
    try:
        async for item in items:
            tally.add(item)
            yield _event(envelope.chunk(item, include_usage))
        if include_usage:
            yield _event(envelope.usage_chunk(tally))
    except Exception as error:
        # The status line is long gone; OpenAI's clients raise on an event that carries an error.
        yield _event(error_object(error, first.request_id))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def error_object(error: Exception, request_id: str = "") -> dict[str, Any]:
    """OpenAI's error object; ``code`` is the gRPC status' name in lower case."""
    status = status_of(error)
    if status is INTERNAL:
        log.error("request %r failed", request_id, exc_info=error)
    return {
        "error": {
            "message": public_message(error, request_id),
            "type": status.kind,
            "param": error.field if isinstance(error, InvalidArgument | NotFound) else None,
            "code": status.grpc.name.lower(),
        }
    }


def error_response(error: Exception, request_id: str = "") -> JSONResponse:
    """``error`` as a response, with what clients that retry by themselves should know."""
    headers = {}
    if isinstance(error, DeadlineExceeded | EngineFailed):
        # OpenAI's client would repeat these twice: its own deadline again, or the crash of engines after its replays.
        headers["x-should-retry"] = "false"
    if isinstance(error, Overloaded | EngineUnavailable):
        headers["Retry-After"] = str(max(1, math.ceil(getattr(error, "retry_after_s", 1.0))))
    return JSONResponse(error_object(error, request_id), status_of(error).http, headers)


def model_json(service: Service, started: int) -> dict[str, Any]:
    """OpenAI's model object; ``max_model_len`` as vLLM has it, null until a target has answered."""
    info = service.targets.last_info
    return {
        "id": service.model,
        "object": "model",
        "created": started,
        "owned_by": "paceline",
        "max_model_len": None if info is None else info.max_model_len,
    }

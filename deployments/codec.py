"""What both doors share: from a client's request to a ``GenerateRequest``, and from an error to a status.

Whatever the protocol, a request passes through ``Codec.encode``, so that both doors refuse the same input with the same
words. Knows neither HTTP nor Ray; the doors know nothing of tokenizers and limits.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import grpc

from cluster.core.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    EngineUnavailable,
    InvalidArgument,
    NotFound,
    Overloaded,
    PacelineError,
    TooLarge,
)
from cluster.core.types import MAX_SEED, GenerateRequest, ModelInfo, SamplingParams, Speculation

MAX_REQUEST_BYTES = 4 * 2**20
MAX_REQUEST_ID = 128
MAX_CACHE_SALT = 512
MAX_MESSAGE = 1000
MIN_SEED = -(2**63)
DRAWN_SEEDS = 2**53  # clients get them back in JSON, whose numbers many read as doubles
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""The roles clients may name, with what chat templates call them: "developer" is OpenAI's newer name of "system"."""
MAX_TEMPLATE_KWARGS = 16
MAX_TEMPLATE_CHARS = 1024
RESERVED_TEMPLATE_KWARGS = frozenset(
    (
        "self",
        "messages",
        "conversation",
        "conversations",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    )
)
"""What ``apply_chat_template`` and the rendering behind it take for themselves: not the client's to set."""
THREAD_ABOVE_CHARS = 4096
"""Longer texts are tokenised in a thread: shorter ones cost less than the hop."""


@dataclass(frozen=True, slots=True)
class Status:
    """How one kind of error looks from outside. ``kind`` is the ``type`` of OpenAI's error object."""

    http: int
    grpc: grpc.StatusCode
    kind: str


INTERNAL = Status(500, grpc.StatusCode.INTERNAL, "internal_server_error")
STATUSES: Mapping[type[PacelineError], Status] = {
    InvalidArgument: Status(400, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error"),
    NotFound: Status(404, grpc.StatusCode.NOT_FOUND, "not_found_error"),
    AlreadyExists: Status(409, grpc.StatusCode.ALREADY_EXISTS, "conflict_error"),
    TooLarge: Status(413, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error"),
    Overloaded: Status(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_error"),
    Aborted: Status(499, grpc.StatusCode.CANCELLED, "request_aborted"),
    EngineUnavailable: Status(503, grpc.StatusCode.UNAVAILABLE, "service_unavailable_error"),
    DeadlineExceeded: Status(504, grpc.StatusCode.DEADLINE_EXCEEDED, "timeout_error"),
}


def status_of(error: BaseException) -> Status:
    """The row of the table for ``error``; ``INTERNAL`` for whatever is not listed."""
    return next((status for kind, status in STATUSES.items() if isinstance(error, kind)), INTERNAL)


def public_message(error: BaseException, request_id: str) -> str:
    """What the client may read: the text of a listed error, and for any other only the id to ask about."""
    if status_of(error) is INTERNAL:
        return f"internal error while serving request {request_id!r}; the server's log has the details"
    text = str(error)  # which may repeat what the client wrote, and has to fit into gRPC's trailers
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ..."


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """A request as the client wrote it; exactly one of ``text``, ``messages``, ``token_ids`` is set.

    ``messages`` are (role, content) pairs; ``chat_template_kwargs`` are further variables of their template, such as
    Qwen3's ``enable_thinking``: booleans, numbers and strings. ``params`` holds those fields of ``SamplingParams`` that
    the client set. ``names`` maps our field names to the client's where they differ, for error messages.
    ``authorization`` and ``trace_parent`` are the protocol's headers ``authorization`` and ``traceparent``.
    """

    text: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    token_ids: tuple[int, ...] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    speculation: Speculation = field(default_factory=Speculation)
    resume_token_ids: tuple[int, ...] = ()
    timeout_s: float | None = None
    request_id: str = ""
    model: str = ""
    priority: int = 0
    cache_salt: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    authorization: str = field(default="", repr=False)
    trace_parent: str = ""

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.text, self.messages, self.token_ids)) != 1:
            raise InvalidArgument("prompt", "exactly one of text, chat messages or token ids is needed")

    @property
    def prompt_field(self) -> str:
        if self.messages is not None:
            return "messages"
        return self.names.get("prompt", "prompt" if self.text is not None else "prompt_token_ids")


class ChatTokenizer(Protocol):
    """The part of a ``transformers`` tokenizer that the doors use."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **kwargs: Any
    ) -> str: ...


class Codec:
    """Turns ``ClientRequest`` into ``GenerateRequest``: every default resolved, every limit checked."""

    def __init__(self, tokenizer: ChatTokenizer, request_timeout_s: float, priorities: bool = False) -> None:
        """``priorities``: whether clients may set one, which takes slots from requests of lower priority."""
        self._tokenizer = tokenizer
        self._priorities = priorities
        self._request_timeout_s = request_timeout_s

    async def encode(self, asked: ClientRequest, info: ModelInfo) -> GenerateRequest:
        """Raises ``InvalidArgument`` naming the client's field, or ``NotFound`` for another model's name."""
        check_model(asked.model, info)
        check_request_id(asked.request_id)
        timeout_s = self._request_timeout_s if asked.timeout_s is None else asked.timeout_s
        if not 0.0 < timeout_s <= self._request_timeout_s:
            raise InvalidArgument("timeout_s", f"{timeout_s} is outside (0, {self._request_timeout_s}]")
        check_speculation(asked.speculation, info)
        if asked.priority and not self._priorities:
            raise InvalidArgument("priority", f"{asked.priority}: needs engine.priorities; allowed: 0")
        if len(asked.cache_salt) > MAX_CACHE_SALT:
            raise InvalidArgument("cache_salt", f"{len(asked.cache_salt)} characters, at most {MAX_CACHE_SALT}")
        prompt = await self._tokenize(asked)
        room = _room(asked, len(prompt), info)  # before a look at each id: there may be millions
        _check_ids(asked.prompt_field, prompt, info.vocab_size)
        params = _params(asked, len(prompt), room, info)
        if len(asked.resume_token_ids) > params.max_tokens:  # as many are answered by why the output ended
            raise InvalidArgument(
                "resume_token_ids", f"{len(asked.resume_token_ids)} ids are more than max_tokens={params.max_tokens}"
            )
        _check_ids("resume_token_ids", asked.resume_token_ids, info.vocab_size)
        return GenerateRequest(
            request_id=asked.request_id or f"gen-{uuid.uuid4().hex}",
            prompt_token_ids=prompt,
            params=params,
            resume_token_ids=asked.resume_token_ids,
            speculation=asked.speculation,
            timeout_s=timeout_s,
            priority=asked.priority,
            cache_salt=asked.cache_salt,
            owner=owner_of(asked.authorization, asked.cache_salt),
            trace_parent=asked.trace_parent,
            call_id=uuid.uuid4().hex,
            model_key=info.model_key,
        )

    async def _tokenize(self, asked: ClientRequest) -> tuple[int, ...]:
        if asked.token_ids is not None:
            return asked.token_ids
        if asked.messages is not None:
            text, special = self._render(asked.messages, asked.chat_template_kwargs), False
        else:
            text, special = asked.text or "", True
        if len(text) > THREAD_ABOVE_CHARS:
            return tuple(await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=special))
        return tuple(self._tokenizer.encode(text, add_special_tokens=special))

    def _render(self, messages: tuple[tuple[str, str], ...], template_kwargs: Mapping[str, Any]) -> str:
        check_template_kwargs(template_kwargs)
        if not messages:
            raise InvalidArgument("messages", "at least one message is needed")
        for index, (role, _) in enumerate(messages):
            if role not in ROLES:
                raise InvalidArgument(f"messages.{index}.role", f"{role!r} is not one of {', '.join(ROLES)}")
        chat = [{"role": ROLES[role], "content": content} for role, content in messages]
        try:
            return self._tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, **template_kwargs
            )
        except Exception as error:
            # The template is the model's own program: it refuses conversations by raising whatever it likes.
            raise InvalidArgument("messages", f"the model's chat template refuses them: {error}") from None


def check_model(name: str, info: ModelInfo) -> None:
    if name and name != info.model:
        raise NotFound(f"model: {name!r} is not served here; served: {info.model}", "model")


def owner_of(authorization: str, cache_salt: str) -> str:
    """Who asks, without telling their key: a digest of the bearer's API key and the salt; "" where neither is given.

    Both count: a front may serve many tenants with one key and a salt for each. Keys are not checked here.
    """
    scheme, _, key = authorization.partition(" ")
    key = key.strip() if scheme.lower() == "bearer" else ""
    if not key and not cache_salt:
        return ""
    return hashlib.sha256(f"{len(key)} {key}{cache_salt}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def check_request_id(request_id: str) -> None:
    if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable():
        raise InvalidArgument("request_id", f"must be at most {MAX_REQUEST_ID} printable characters")


def check_template_kwargs(given: Mapping[str, Any]) -> None:
    """Few and small, since every template is free in what it does with them. Raises ``InvalidArgument``."""
    if len(given) > MAX_TEMPLATE_KWARGS:
        raise InvalidArgument("chat_template_kwargs", f"{len(given)} keys, at most {MAX_TEMPLATE_KWARGS}")
    for name, value in given.items():
        where = f"chat_template_kwargs.{name}"
        if name in RESERVED_TEMPLATE_KWARGS:
            raise InvalidArgument(where, "is reserved: the server sets it")
        if not isinstance(value, bool | int | float | str):
            raise InvalidArgument(where, "must be a boolean, a number or a string")
        if isinstance(value, str) and len(value) > MAX_TEMPLATE_CHARS:
            raise InvalidArgument(where, f"{len(value)} characters, at most {MAX_TEMPLATE_CHARS}")


def check_speculation(speculation: Speculation, info: ModelInfo) -> None:
    """A stage may be asked for only where it runs."""
    for stage in speculation.stages or ():
        if stage not in info.stages:
            raise InvalidArgument(
                "speculation.stages", f"{stage!r} is not served here; served: {', '.join(info.stages) or 'none'}"
            )


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise InvalidArgument(f"{name}.{index}", f"token id {token} is outside [0, {vocab_size})")


def _room(asked: ClientRequest, prompt_len: int, info: ModelInfo) -> int:
    """How many tokens the context has left behind the prompt."""
    if prompt_len == 0:
        raise InvalidArgument(asked.prompt_field, "is empty; at least one token is needed")
    room = info.max_model_len - prompt_len
    if room < 1:
        raise InvalidArgument(
            asked.prompt_field,
            f"{prompt_len} tokens leave no room for output; the context holds {info.max_model_len}",
        )
    return room


def _params(asked: ClientRequest, prompt_len: int, room: int, info: ModelInfo) -> SamplingParams:
    """Sampling parameters with seed and max_tokens resolved, checked against the model's context and vocabulary.

    OpenAI's seeds are signed: a negative one is taken modulo 2**64. Its ``top_p`` may be 0: our ``top_k`` 1.
    """
    values = {"max_tokens": room, **asked.params}
    values.setdefault("seed", secrets.randbelow(DRAWN_SEEDS))
    if MIN_SEED <= values["seed"] < 0:
        values["seed"] += MAX_SEED + 1
    best_only = values.get("top_p") == 0.0
    if best_only:
        del values["top_p"]
    try:
        params = SamplingParams(**values)
    except InvalidArgument as error:
        raise InvalidArgument(asked.names.get(error.field, error.field), error.message) from None
    if params.max_tokens > room:
        raise InvalidArgument(
            asked.names.get("max_tokens", "max_tokens"),
            f"{params.max_tokens} is more than the {room} tokens that a prompt of {prompt_len} leaves"
            f" of the context's {info.max_model_len}",
        )
    if best_only:
        params = replace(params, top_k=1)
    _check_ids("stop_token_ids", params.stop_token_ids, info.vocab_size)
    _check_ids("logit_bias", (token for token, _ in params.logit_bias), info.vocab_size)
    return params

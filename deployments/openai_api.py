"""OpenAI's request and response bodies, with vLLM's extras: JSON in, ``ClientRequest`` out; items in, JSON out.

Nothing is silently ignored: a field is served, or refused by name, or stands in ``IGNORED`` because it cannot change
an answer. Extra response fields: ``seed`` and ``speculation`` beside ``usage``; ``token_ids``, ``origins`` and
``position`` in each choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError
from pydantic_core import from_json

from cluster.core.errors import InvalidArgument
from cluster.core.types import Origin, Speculation, SpeculationStats
from deployments.codec import ClientRequest
from deployments.service import Usage

MAX_SHOWN = 80  # characters of an offending value

IGNORED = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "parallel_tool_calls",
    )
)
"""Accounting and caching hints, accepted and ignored: no value of theirs changes an answer."""

CACHE_HINTS = frozenset(("prompt_cache_breakpoint",))
"""The same in a part of a message's content."""

UNSERVED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}
"""Fields of OpenAI's API that are not served, with the values that ask for nothing; null always does."""

INSTEAD = {"reasoning_effort": "a model's template may have such a switch, which chat_template_kwargs reach"}
"""What serves the purpose of a field that is not served."""

UNSERVED_IN_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "audio": (),
    "annotations": ([],),
}


def _refuse_unserved(body: Any, unserved: Mapping[str, tuple[Any, ...]], where: str = "") -> Any:
    """``body`` without its unserved fields, all of which ask for nothing. Raises ``InvalidArgument`` otherwise."""
    if not isinstance(body, dict):
        return body
    for name in body.keys() & unserved.keys():
        asks_for_nothing = (None, *unserved[name])
        if not any(type(body[name]) is type(value) and body[name] == value for value in asks_for_nothing):
            allowed = " or ".join(json.dumps(value) for value in asks_for_nothing)
            hint = f"; {INSTEAD[name]}" if name in INSTEAD else ""
            raise InvalidArgument(
                f"{where}{name}", f"{_shown(body[name])} is not served; allowed here: {allowed}{hint}"
            )
    return {name: value for name, value in body.items() if name not in unserved}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _ids(value: Any) -> tuple[int, ...]:
    if not _is_ids(value):
        raise ValueError("must be a list of integers")
    return tuple(value)


def _prompt(value: Any) -> str | tuple[int, ...]:
    """One prompt, as text or token ids; OpenAI's lists are taken where they hold one prompt."""
    if isinstance(value, list) and value and not _is_ids(value):
        if len(value) > 1:
            raise ValueError(f"{len(value)} prompts in one call are not served; send one request for each")
        value = value[0]
    if isinstance(value, str):
        return value
    if _is_ids(value):
        return tuple(value)
    raise ValueError("must be a string or a list of token ids")


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    return tuple(stops)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise ValueError("must map token ids to numbers")
    pairs = []
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit()) or type(bias) not in (int, float):
            raise ValueError(f"must map token ids to numbers, got {token!r}: {bias!r}")
        try:
            pairs.append((int(token), float(bias)))
        except OverflowError:
            raise ValueError(f"the bias of token {token} is too large") from None
    return tuple(sorted(pairs))


def _content(value: Any) -> str:
    """Text, or OpenAI's list of parts where every part is text."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.keys() - CACHE_HINTS != {"type", "text"} or part["type"] != "text":
            raise ValueError('only parts of the form {"type": "text", "text": ...} are served')
        if not isinstance(part["text"], str):
            raise ValueError("a part's text must be a string")
        texts.append(part["text"])
    return "".join(texts)


def _nullable(parse: Callable[[Any], Any]) -> PlainValidator:
    return PlainValidator(lambda value: None if value is None else parse(value))


B = TypeVar("B", bound="GenerationBody")
Ids = Annotated[tuple[int, ...] | None, _nullable(_ids)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Body):
    """``include_obfuscation``: padding against listeners on the line; ignored."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SpeculationOptions(_Body):
    enabled: bool | None = None
    max_nodes: int | None = None
    stages: list[str] | None = None


class GenerationBody(_Body):
    """What both endpoints take. None is unset, as null is in OpenAI's API."""

    endpoint: ClassVar[str]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None  # 0: the best token only
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None  # a negative one is taken modulo 2**64, as which it comes back
    stop: Annotated[tuple[str, ...] | None, _nullable(_stop)] = None
    stop_token_ids: Ids = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[tuple[tuple[int, float], ...] | None, _nullable(_logit_bias)] = None
    speculation: SpeculationOptions | None = None
    resume_token_ids: Ids = None
    timeout_s: float | None = None
    request_id: str | None = None
    priority: int | None = None
    cache_salt: str | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def asked(self, **prompt: Any) -> ClientRequest:
        """The request in the codec's terms. ``prompt``: the one of its three prompt fields, and what belongs to it."""
        options = self.speculation or SpeculationOptions()
        if self.stream_options is not None and not self.stream:
            raise InvalidArgument("stream_options", "is allowed with stream=true only")
        return ClientRequest(
            params=self._params(),
            speculation=Speculation(
                enabled=options.enabled is not False,
                max_nodes=options.max_nodes,
                stages=tuple(options.stages) if options.stages else None,
            ),
            resume_token_ids=self.resume_token_ids or (),
            timeout_s=self.timeout_s,
            request_id=self.request_id or "",
            model=self.model or "",
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
            **prompt,
        )

    def _params(self) -> dict[str, Any]:
        values = {
            "max_tokens": self.max_tokens,
            "min_tokens": self.min_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias,
        }
        return {name: value for name, value in values.items() if value is not None}


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    endpoint = "text_completion"
    prompt: Annotated[str | tuple[int, ...], PlainValidator(_prompt)]

    def client_request(self) -> ClientRequest:
        if isinstance(self.prompt, str):
            return self.asked(text=self.prompt)
        return self.asked(token_ids=self.prompt, names={"prompt": "prompt"})


class Message(_Body):
    role: str
    content: Annotated[str, PlainValidator(_content)] = ""


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    endpoint = "chat.completion"
    messages: list[Message]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def client_request(self) -> ClientRequest:
        messages = tuple((m.role, m.content) for m in self.messages)
        chat: dict[str, Any] = {"messages": messages, "chat_template_kwargs": self.chat_template_kwargs or {}}
        if self.max_completion_tokens is None:
            return self.asked(**chat)
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise InvalidArgument("max_completion_tokens", "differs from max_tokens, its older name; send one of them")
        return self.asked(**chat, names={"max_tokens": "max_completion_tokens"})

    def _params(self) -> dict[str, Any]:
        limit = self.max_completion_tokens
        return super()._params() | ({} if limit is None else {"max_tokens": limit})


def parse_body(kind: type[B], body: bytes) -> B:
    """Raises ``InvalidArgument`` naming the first offending field."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidArgument("body", f"is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidArgument("body", "must be a JSON object")
    data = {name: value for name, value in data.items() if name not in IGNORED}
    data = _refuse_unserved(data, UNSERVED)
    if isinstance(messages := data.get("messages"), list):
        data["messages"] = [
            _refuse_unserved(message, UNSERVED_IN_MESSAGE, f"messages.{index}.")
            if isinstance(message, dict)
            else message
            for index, message in enumerate(messages)
        ]
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        issue = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in issue["loc"])
        if issue["type"] == "extra_forbidden":
            known = ", ".join(_known(kind, issue["loc"]))
            raise InvalidArgument(name, f"is not a known field; known: {known}") from None
        got = "" if issue["type"] in ("missing", "value_error") else f", got {_shown(issue['input'])}"
        raise InvalidArgument(name, issue["msg"].removeprefix("Value error, ") + got) from None


def _shown(value: Any) -> str:
    """An offending value, in a few words where it is long: the door's other streams wait meanwhile."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, str) and len(value) > MAX_SHOWN:
        value = f"{value[:MAX_SHOWN]}..."
    text = json.dumps(value)
    return text if isinstance(value, str) or len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _known(kind: type[BaseModel], where: Sequence[str | int]) -> list[str]:
    """The fields beside the one that ``where`` leads to."""
    for part in where[:-1]:
        field = kind.model_fields.get(str(part))
        kind = next(iter(_models(field.annotation)), kind) if field is not None else kind
    return sorted(kind.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field's type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def speculation_json(stats: SpeculationStats) -> dict[str, Any]:
    stages = (Origin.SMALL, Origin.MEDIUM, Origin.TARGET)
    return {
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "mean_accepted_length": stats.mean_accepted_length,
        "tokens_by_origin": {stage.name.lower(): stats.tokens_by_origin[stage] for stage in stages},
    }


def origins_json(origins: Sequence[Origin]) -> list[str]:
    return [origin.name.lower() for origin in origins]

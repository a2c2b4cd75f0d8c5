"""OpenTelemetry spans of requests and their rounds, for ``engine.tracing: true``; else nobody imports this module.

A request's span goes from its arrival at the engine to its end. Below it are its wait for a KV slot and its rounds, and
below each round the wait for drafts, the verify step and the walk that accepts. A step serves many sessions: each has a
round of its own in its own trace, with the step's times and its own nodes. Spans are made when a step is over, from the
times that the scheduler takes anyway. docs/metrics.md says how to turn them on and what they cost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from cluster.core.errors import ConfigError
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin
from cluster.rounds.governor import RoundSpent
from cluster.rounds.session import Phase, Session

if TYPE_CHECKING:
    from cluster.rounds.scheduler import Outcome

EXPORTERS = "opentelemetry_traces_exporter"  # the group under which exporters' packages register them
OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
INSTALL = "pip install '.[tracing]'"


class RoundTracer:
    """Keeps the spans of requests in flight. Engine thread only, but for ``close``."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("paceline")
        self._requests: dict[str, Span] = {}  # by session id; sampled ones only

    def arrived(self, session: Session) -> None:
        """Begin the request's span, in its client's trace if it named one."""
        request = session.request
        caller = TraceContextTextMapPropagator().extract({"traceparent": request.trace_parent}, Context())
        attributes: dict[str, AttributeValue] = {
            "gen_ai.request.id": request.request_id,
            "gen_ai.request.temperature": request.params.temperature,
            "gen_ai.request.max_tokens": request.params.max_tokens,
            "gen_ai.usage.input_tokens": session.prompt_len,
            "paceline.epoch": request.epoch,
            "paceline.priority": request.priority,
        }
        span = self._tracer.start_span("request", caller, SpanKind.SERVER, attributes)
        if span.is_recording():
            self._requests[session.id] = span

    def admitted(self, session: Session, waited_s: float) -> None:
        """The session got a KV slot, ``waited_s`` after its arrival."""
        parent = self._requests.get(session.id)
        if parent is not None and session.num_admitted == 1:
            now = time.time_ns()
            parent.set_attribute("paceline.cached_tokens", session.cached_tokens)
            begun = now - int(1e9 * waited_s)
            self._tracer.start_span("queue", set_span_in_context(parent), start_time=begun).end(now)

    def preempted(self, session: Session) -> None:
        if session.id in self._requests:
            self._requests[session.id].add_event("preempted", {"paceline.output_tokens": session.num_output})

    def round(self, mode: str, spent: RoundSpent, parts: Iterable[tuple[TokenTree, Outcome]]) -> None:
        """A step has just ended. ``parts``: what it verified for each of its decoding sessions, and what came of it."""
        end = time.time_ns()
        start = end - int(1e9 * spent.total)
        drafted = start + int(1e9 * spent.draft)
        verified = drafted + int(1e9 * spent.forward)
        for tree, outcome in parts:
            session = outcome.session
            parent = self._requests.get(session.id)
            if parent is None:
                continue
            origins = outcome.item.origins if outcome.item is not None else ()
            accepted = sum(origin is not Origin.TARGET for origin in origins)
            stages = tuple(Origin(stage).name.lower() for stage in sorted(set(tree.stages.tolist())))
            facts: dict[str, AttributeValue] = {
                "paceline.nodes": len(tree),
                "paceline.accepted": accepted,
                "paceline.stages": stages,
                "paceline.mode": mode,
            }
            span = self._tracer.start_span("round", set_span_in_context(parent), attributes=facts, start_time=start)
            below = set_span_in_context(span)
            self._tracer.start_span("draft wait", below, start_time=start).end(drafted)
            self._tracer.start_span("verify", below, attributes=facts, start_time=drafted).end(verified)
            walk = self._tracer.start_span("accept", below, attributes=facts, start_time=verified)
            walk.end(verified + int(1e9 * spent.accept))
            span.end(end)
            if session.phase is Phase.FINISHED:
                self.ended(session)

    def ended(self, session: Session) -> None:
        """The session finished, failed or was aborted."""
        span = self._requests.pop(session.id, None)
        if span is None:
            return
        stats = session.stats
        span.set_attributes(
            {
                "gen_ai.usage.output_tokens": session.num_output,
                "gen_ai.response.finish_reasons": (session.finish_reason or "error",),
                "paceline.rounds": stats.rounds,
                "paceline.nodes": stats.drafted,
                "paceline.accepted": stats.accepted,
                "paceline.mean_accepted_length": stats.mean_accepted_length,
            }
        )
        if session.finish_reason is None:
            span.set_status(StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Send what is left to send."""
        self._provider.shutdown()


def start_tracing(environ: Mapping[str, str] = os.environ) -> RoundTracer:
    """A tracer as OpenTelemetry's standard variables configure it; without any, OTLP over HTTP to localhost:4318.

    Raises ``ConfigError`` where the exporter they ask for is not installed.
    """
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "paceline"}))
    provider = TracerProvider(resource=resource.merge(Resource({"process.pid": os.getpid()})))
    for exporter in span_exporters(environ):
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return RoundTracer(provider)


def span_exporters(environ: Mapping[str, str]) -> Iterator[SpanExporter]:
    """Those that ``OTEL_TRACES_EXPORTER`` names (otlp, console, none, any installed one); unset, OTLP's."""
    installed = {point.name: point for point in entry_points(group=EXPORTERS)}
    for name in environ.get("OTEL_TRACES_EXPORTER", "otlp").split(","):
        wanted = _otlp(environ) if name.strip() == "otlp" else name.strip()
        if wanted == "none":
            continue
        if wanted not in installed:
            names = ", ".join(sorted(installed)) or "none"
            raise ConfigError(
                f"engine.tracing: the span exporter {wanted!r} is not installed: {INSTALL}; "
                f"OTEL_TRACES_EXPORTER may name one of those installed: {names}"
            )
        exporter: SpanExporter = installed[wanted].load()()
        yield exporter


def _otlp(environ: Mapping[str, str]) -> str:
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((environ[name] for name in variables if environ.get(name)), "http/protobuf")
    if protocol not in OTLP:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL: {protocol!r} is not one of {', '.join(OTLP)}")
    return OTLP[protocol]

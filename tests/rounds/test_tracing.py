"""Spans of requests and their rounds, and what is said where they cannot be had."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
from fakes import ScriptedDrafter, always_wrong, oracle
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode
from rounds.engine_rig import Letters, PoisonedRank
from tiny import VOCAB, save_tiny_llama

from cluster.assemble import round_tracer
from cluster.core.config import EngineConfig
from cluster.core.errors import ConfigError
from cluster.core.types import GenerateRequest, SamplingParams
from cluster.engine.rank import Rank, build_rank
from cluster.engine.step_cost import CostCurve
from cluster.engine.verifier import Verifier
from cluster.rounds.detokenize import TextStream
from cluster.rounds.scheduler import Scheduler
from cluster.rounds.session import Limits, Session
from cluster.rounds.tracing import RoundTracer, span_exporters
from drafters.base import Drafter

LENGTH = 100
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TOKENS = 12


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Rank:
    folder = save_tiny_llama(tmp_path_factory.mktemp("target"), layers=1)
    return build_rank(folder, "float64", num_slots=4, capacity=LENGTH, scratch=16, threads=1)


class Traced:
    """A scheduler whose spans are kept."""

    def __init__(self, rank: Rank, local: Drafter | None = None, provider: TracerProvider | None = None) -> None:
        provider = provider or TracerProvider()
        self._spans = InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(self._spans))
        config = EngineConfig(max_model_len=LENGTH, kv_slots=4, max_nodes=4, max_rows=16, governor="always")
        curve = CostCurve((1, 16), (1.0, 1.0))
        self.scheduler = Scheduler(config, Verifier(rank), curve, local, tracer=RoundTracer(provider))

    def submit(
        self,
        name: str,
        prompt: Sequence[int] = (5, 6),
        tokens: int = TOKENS,
        trace_parent: str = "",
        stop_token_ids: tuple[int, ...] = (),
    ) -> Session:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, stop_token_ids=stop_token_ids)
        request = GenerateRequest(name, tuple(prompt), params, trace_parent=trace_parent)
        session = Session(request, Limits(LENGTH, frozenset()), TextStream(Letters(False)))
        self.scheduler.submit(session)
        return session

    def run(self) -> None:
        while not self.scheduler.idle:
            self.scheduler.step()

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._spans.get_finished_spans() if span.name == name]

    def below(self, parent: ReadableSpan) -> list[ReadableSpan]:
        assert parent.context is not None
        own = parent.context.span_id
        return [s for s in self._spans.get_finished_spans() if s.parent is not None and s.parent.span_id == own]


def answer(rank: Rank) -> list[int]:
    traced = Traced(rank)
    session = traced.submit("r")
    traced.run()
    return session.tokens[session.prompt_len :]


def test_a_request_has_a_span_with_its_rounds_and_each_round_its_parts(rank: Rank) -> None:
    traced = Traced(rank, ScriptedDrafter(oracle({(5, 6): answer(rank)})))
    session = traced.submit("r")
    traced.run()
    (request,) = traced.spans("request")
    rounds = [span for span in traced.below(request) if span.name == "round"]
    assert [span.name for span in traced.below(request)].count("queue") == 1
    assert len(rounds) == session.stats.rounds
    for one in rounds:
        parts = traced.below(one)
        assert [part.name for part in parts] == ["draft wait", "verify", "accept"]
        times = [one.start_time, *(part.start_time for part in parts), parts[-1].end_time, one.end_time]
        assert times == sorted(times)  # type: ignore[type-var]
        assert [part.end_time for part in parts[:-1]] == [part.start_time for part in parts[1:]]


def test_rounds_say_what_was_verified_what_was_accepted_and_who_guessed_it(rank: Rank) -> None:
    traced = Traced(rank, ScriptedDrafter(oracle({(5, 6): answer(rank)})))
    session = traced.submit("r")
    traced.run()
    facts = [span.attributes or {} for span in traced.spans("round")]
    stats = session.stats
    assert sum(fact["paceline.nodes"] for fact in facts) == stats.drafted > 0  # type: ignore[misc]
    assert sum(fact["paceline.accepted"] for fact in facts) == stats.accepted > 0  # type: ignore[misc]
    assert {fact["paceline.stages"] for fact in facts} == {(), ("small",)}
    (request,) = traced.spans("request")
    said = request.attributes or {}
    assert said["gen_ai.request.id"] == "r"
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (2, TOKENS)
    assert said["gen_ai.response.finish_reasons"] == ("length",)
    assert said["paceline.rounds"] == stats.rounds


def test_guesses_behind_a_stop_count_as_accepted_nowhere(rank: Rank) -> None:
    output = answer(rank)
    traced = Traced(rank, ScriptedDrafter(oracle({(5, 6): output})))
    session = traced.submit("r", stop_token_ids=(output[2],))
    traced.run()
    accepted = [(span.attributes or {})["paceline.accepted"] for span in traced.spans("round")]
    assert session.num_output == 3
    assert sum(accepted) == session.stats.accepted  # type: ignore[arg-type]


def test_sessions_of_one_step_have_rounds_of_their_own_in_traces_of_their_own(rank: Rank) -> None:
    traced = Traced(rank, ScriptedDrafter(always_wrong(VOCAB)))
    for name in ("a", "b"):
        traced.submit(name)
    traced.run()
    first, second = traced.spans("request")
    assert first.context is not None
    assert second.context is not None
    assert first.context.trace_id != second.context.trace_id
    assert len(traced.below(first)) == len(traced.below(second)) == TOKENS + 1


def test_a_request_hangs_on_its_clients_span_where_it_named_one(rank: Rank) -> None:
    traced = Traced(rank)
    for trace_parent in (CALLER, "nonsense", ""):
        traced.submit(trace_parent or "none", tokens=1, trace_parent=trace_parent)
    traced.run()
    parents = {(span.attributes or {})["gen_ai.request.id"]: span.parent for span in traced.spans("request")}
    caller = parents.pop(CALLER)
    assert caller is not None
    assert f"{caller.span_id:016x}" == CALLER.split("-")[2]
    assert set(parents.values()) == {None}


def test_an_aborted_request_ends_its_span_and_a_preempted_one_goes_on_in_it(rank: Rank) -> None:
    traced = Traced(rank)
    aborted, preempted = traced.submit("aborted"), traced.submit("preempted")
    traced.scheduler.step()
    traced.scheduler.step()
    traced.scheduler.preempt(preempted)
    traced.scheduler.abort(aborted)
    (span,) = traced.spans("request")
    assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("abort",)
    traced.run()
    span = traced.spans("request")[1]
    assert [event.name for event in span.events] == ["preempted"]
    assert len(traced.spans("queue")) == 2
    assert traced.scheduler._tracer is not None
    assert traced.scheduler._tracer._requests == {}


def test_a_request_that_fails_is_marked_as_an_error(rank: Rank, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_tiny_llama(tmp_path_factory.mktemp("poisoned"), layers=1)
    poisoned = build_rank(folder, "float64", num_slots=4, capacity=LENGTH, scratch=16, threads=1)
    poisoned.__class__ = PoisonedRank
    traced = Traced(poisoned)
    traced.submit("r", (77,))
    traced.run()
    (span,) = traced.spans("request")
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("error",)


def test_requests_that_are_not_sampled_make_no_spans_at_all(rank: Rank) -> None:
    traced = Traced(rank, provider=TracerProvider(sampler=ALWAYS_OFF))
    traced.submit("r")
    traced.run()
    assert traced.spans("request") == traced.spans("round") == []


def test_tokens_are_the_same_with_tracing_and_without(rank: Rank) -> None:
    config = EngineConfig(max_model_len=LENGTH, kv_slots=4, max_rows=16)
    scheduler = Scheduler(config, Verifier(rank), CostCurve((1, 16), (1.0, 1.0)))
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    session = Session(GenerateRequest("r", (5, 6), params), Limits(LENGTH, frozenset()), TextStream(Letters(False)))
    scheduler.submit(session)
    while not scheduler.idle:
        scheduler.step()
    assert session.tokens[2:] == answer(rank)


def test_off_is_the_default_and_makes_no_tracer() -> None:
    assert round_tracer(EngineConfig()) is None


def test_tracing_without_the_library_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cluster.rounds.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"engine.tracing: .*opentelemetry.* pip install '\.\[tracing\]'"):
        round_tracer(EngineConfig(tracing=True))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, r"'zipkin' is not installed: pip install .* installed: .*console"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "'http/json' is not one of http/protobuf, grpc"),
    ],
)
def test_an_exporter_that_is_not_there_is_a_configuration_error(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(span_exporters(environ))


@pytest.mark.parametrize(("names", "kinds"), [("none", []), ("console", ["ConsoleSpanExporter"])])
def test_the_standard_variable_names_the_exporters(names: str, kinds: list[str]) -> None:
    assert [type(exporter).__name__ for exporter in span_exporters({"OTEL_TRACES_EXPORTER": names})] == kinds

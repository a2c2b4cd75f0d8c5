"""A ``VllmEngine`` on an event loop of its own, driven from a test's thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from cluster.core.config import ServiceConfig, parse_config
from cluster.core.types import GenerateRequest, SamplingParams, StreamItem
from cluster.vllm_engine import VllmEngine

CALL_LIMIT_S = 240


class Engine:
    """Eager, so that it starts in seconds; ``engine_args`` and other keys as in ``ServiceConfig``."""

    def __init__(self, source: str, dtype: str, drafters: str = "", **config: Any) -> None:
        args = {"enforce_eager": True, "seed": 0, **config.pop("engine_args", {})}
        engine = {"max_model_len": 512, "kv_slots": 8, "max_waiting": 8, **config.pop("engine", {})}
        fields = {
            "model": {"source": source, "name": "m", "dtype": dtype},
            "engine": engine,
            "engine_args": args,
            "llm_engine": "vllm",
            **config,
        }
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.engine = VllmEngine(parse_config(ServiceConfig, fields), drafters)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.submit(work).result(CALL_LIMIT_S)

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def items(self, request: GenerateRequest, on_item: Callable[[StreamItem], None] = lambda item: None) -> Any:
        async def collect() -> list[StreamItem]:
            found: list[StreamItem] = []
            async with aclosing(self.engine.generate(request)) as items:  # type: ignore[type-var]
                async for item in items:
                    found.append(item)
                    on_item(item)
            return found

        return self.run(collect())

    def outputs(
        self, prompts: Sequence[Sequence[int]], concurrency: int, tokens: int = 32, **fields: Any
    ) -> list[list[int]]:
        """Greedy token ids of every prompt, so many at once."""

        def one(index: int) -> list[int]:
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            request = GenerateRequest(f"r{index}", tuple(prompts[index]), params, **fields)
            return [token for item in self.items(request) for token in item.token_ids]

        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(one, range(len(prompts))))

    def report(self) -> dict[str, Any]:
        """What the proposer counts."""
        reports = self.run(self.engine._llm.collective_rpc("paceline_report"))
        return next((report for report in reports if report is not None), {})

    def load(self) -> Any:
        async def load() -> Any:
            return self.engine.load()

        return self.run(load())

    def close(self) -> None:
        self.engine.close()
        self._loop.call_soon_threadsafe(self._loop.stop)

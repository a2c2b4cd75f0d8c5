"""Replay: a stream that outlives its target.

The ingress owns the truth of a call in flight: prompt ids, parameters with the seed resolved, and the ids delivered so
far. Output is a function of these (``docs/exactness.md``), so when a target dies, another one goes on after the last
delivered token and the client sees a pause, nothing else. Knows nothing of Ray: ``Backend`` is the ingress' view of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.core.errors import DeadlineExceeded, EngineDied, EngineFailed, EngineUnavailable, Overloaded, PacelineError
from cluster.core.types import GenerateRequest, SpeculationStats, StreamItem

MAX_CRASHES = 2
"""A request whose own step crashed this many engines is failed: it would crash the next one too."""
PROBE_PAUSE_S = 0.2


class Backend(Protocol):
    """Targets, as replay sees them. Methods raise errors of ``cluster.core.errors`` only."""

    @property
    def serving(self) -> bool:
        """Whether a target answered of late."""
        ...

    def watch(self) -> AsyncGenerator[bool, None]:
        """``serving`` now, then at every change."""
        ...

    def open(self, request: GenerateRequest) -> AsyncGenerator[StreamItem, None]:
        """One attempt on one target. Closing the generator aborts the session there."""
        ...

    async def probe(self, timeout_s: float) -> None:
        """Return once a target answered. Raises ``EngineUnavailable`` where none did within ``timeout_s``."""
        ...


@dataclass(frozen=True, slots=True)
class ReplayLimits:
    """How many deaths of targets a request survives, and for how long after one another target is tried."""

    max_replays: int
    timeout_s: float


class _Progress:
    """What was delivered, over all attempts."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self._delivered: list[int] = []
        self._before = self._stats = SpeculationStats()
        self._first = True

    def attempt(self, number: int, admitted: bool, timeout_s: float | None) -> GenerateRequest:
        """The request for attempt ``number``: the original, continued after what was delivered."""
        self._before = self._stats
        return replace(
            self._request,
            epoch=self._request.epoch + number,
            admitted=admitted,
            resume_token_ids=self._request.resume_token_ids + tuple(self._delivered),
            timeout_s=timeout_s,
        )

    def deliver(self, item: StreamItem) -> StreamItem:
        """The item as the client shall see it: totals over all attempts, the seed once."""
        self._delivered.extend(item.token_ids)
        self._stats = _add(self._before, item.stats)
        seed = self._request.params.seed if self._first else None
        self._first = False
        return replace(item, stats=self._stats, seed=seed)


def _add(a: SpeculationStats, b: SpeculationStats) -> SpeculationStats:
    target, small, medium = (x + y for x, y in zip(a.tokens_by_origin, b.tokens_by_origin, strict=True))
    return SpeculationStats(
        a.rounds + b.rounds, a.drafted + b.drafted, a.accepted + b.accepted, (target, small, medium)
    )


async def generate(
    backend: Backend, request: GenerateRequest, limits: ReplayLimits
) -> AsyncGenerator[StreamItem, None]:
    """Items of one request until its finish, over as many targets as that takes.

    Raises ``DeadlineExceeded`` after ``request.timeout_s``, ``EngineUnavailable`` where targets died more than
    ``max_replays`` times or none went on in time, ``EngineFailed`` where the request itself crashes engines. A request
    that comes while targets restart waits for one, too.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + request.timeout_s if request.timeout_s is not None else None
    if not backend.serving:
        await _until_serving(backend, limits.timeout_s, deadline, request)
    progress = _Progress(request)
    attempt = deaths = crashes = 0
    give_up: float | None = None
    over = False
    while True:
        remaining = request.timeout_s if deadline is None else max(deadline - clock(), 0.001)
        began = False
        try:
            async with aclosing(backend.open(progress.attempt(attempt, deaths > 0, remaining))) as items:
                while (item := await _next(items, deadline, request)) is not None:
                    over = item.finish_reason is not None
                    began, give_up = True, None
                    yield progress.deliver(item)
            return
        except (EngineUnavailable, EngineFailed, Overloaded) as error:
            if over:  # the target died after its last item
                return
            if isinstance(error, Overloaded) and deaths == 0:
                raise
            # Who refuses has not died of the request: of several targets, the router may offer such a one for a while.
            deaths += began or isinstance(error, EngineDied | EngineFailed)
            crashes += isinstance(error, EngineFailed)
            if deaths > limits.max_replays or crashes == MAX_CRASHES:
                raise
        attempt += 1
        give_up = give_up or clock() + limits.timeout_s
        await _await_target(backend, give_up, limits.timeout_s, deadline, request)


async def _next(
    items: AsyncGenerator[StreamItem, None], deadline: float | None, request: GenerateRequest
) -> StreamItem | None:
    """The next item, None after the last."""
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(items)
    except StopAsyncIteration:
        return None
    except TimeoutError:
        raise _too_late(request) from None


async def _until_serving(backend: Backend, timeout_s: float, deadline: float | None, request: GenerateRequest) -> None:
    """Wait for the refresh that finds a target: many may wait, so none of them asks by itself."""
    clock = asyncio.get_running_loop().time
    give_up = clock() + timeout_s
    try:
        async with asyncio.timeout_at(give_up if deadline is None else min(give_up, deadline)):
            async with aclosing(backend.watch()) as states:
                async for serving in states:
                    if serving:
                        return
    except TimeoutError:
        if deadline is not None and deadline <= give_up:
            raise _too_late(request) from None
        raise EngineUnavailable(f"no target answered within {timeout_s:g} s: loading or restarting") from None


async def _await_target(
    backend: Backend, give_up: float, timeout_s: float, deadline: float | None, request: GenerateRequest
) -> None:
    """Wait until some target answers; the router may go on offering the dead one for a moment."""
    clock = asyncio.get_running_loop().time
    while True:
        if deadline is not None and clock() >= deadline:
            raise _too_late(request)
        patience = give_up - clock()
        if patience <= 0:
            raise EngineUnavailable(f"no target went on with it within {timeout_s:g} s of the last one's death")
        await asyncio.sleep(min(PROBE_PAUSE_S, patience))
        try:
            await backend.probe(min(1.0, max(patience, 0.01)))
        except PacelineError:
            continue
        return


def _too_late(request: GenerateRequest) -> DeadlineExceeded:
    return DeadlineExceeded(f"request {request.request_id!r} took longer than {request.timeout_s:g} s")

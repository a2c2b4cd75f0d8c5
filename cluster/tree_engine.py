"""``TreeEngine``: the engine thread that drives the rounds, and the queues where it meets the doors' event loop.

Only the engine thread touches the scheduler and torch. Requests reach it through an inbox; items leave through one
asyncio queue per request. A request is registered before it is in the inbox, under the lock that also guards the
engine's end: nobody can wait for an engine that has ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

from cluster.core.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    EngineDied,
    EngineFailed,
    EngineUnavailable,
    InvalidArgument,
    PacelineError,
)
from cluster.core.stats import FAILED, Health, Load
from cluster.core.types import GenerateRequest, ModelInfo, StreamItem
from cluster.engine.kv_cache import KVCache
from cluster.rounds.detokenize import TextStream
from cluster.rounds.pacing import Pace, Pacer
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.scheduler import Outcome, Scheduler
from cluster.rounds.session import Limits, Phase, Session

log = logging.getLogger(__name__)

HEARTBEAT_LIMIT_S = 60.0  # a step that takes longer than this is stuck
CLOSE_LIMIT_S = 30.0


@dataclass(slots=True)
class _Call:
    """One request in flight: where its items go. ``session`` exists once the engine thread has seen the request."""

    request: GenerateRequest
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[StreamItem | PacelineError] = field(default_factory=asyncio.Queue)
    session: Session | None = None
    pacer: Pacer = field(default_factory=Pacer)

    @property
    def begun(self) -> bool:
        """Whether it has had a part in steps."""
        return self.session is not None and self.session.phase is not Phase.WAITING

    def send(self, message: StreamItem | PacelineError) -> None:
        try:
            self.loop.call_soon_threadsafe(self.items.put_nowait, message)
        except RuntimeError:  # the door's loop is gone, and with it whoever waited
            log.debug("request %s: nobody listens any more", self.request.request_id)


class TreeEngine:
    """Implements ``cluster.core.types.Engine`` over a scheduler. Close it to stop its thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        kv: KVCache,
        info: ModelInfo,
        limits: Limits,
        text_of: Callable[[GenerateRequest], TextStream],
        pipeline: Pipeline | None = None,
        on_close: Callable[[], None] | None = None,
        pace: Pace | None = None,
        rank_pids: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._scheduler = scheduler
        self._kv = kv
        self._info = info
        self._limits = limits
        self._text_of = text_of
        self._pipeline = pipeline
        self._on_close = on_close
        self._pace = pace or Pace()
        self._own_pids = {"target": os.getpid(), **rank_pids}
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._calls: dict[str, _Call] = {}  # by request id: what the doors have in flight
        self._ended: PacelineError | None = None
        self._sessions: dict[str, _Call] = {}  # by session id: what the engine thread has in flight
        self._failure = ""
        self._stopped = False
        self._heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- the doors' side: any event loop

    async def generate(self, request: GenerateRequest) -> AsyncIterator[StreamItem]:
        """See ``Engine.generate``. Leaving the iterator early aborts the session.

        The doors keep the request's deadline, too; here it also holds for a door that is gone.
        """
        check_request(request, self._info)
        call = _Call(request, asyncio.get_running_loop())
        self._register(call)
        deadline = None if request.timeout_s is None else call.loop.time() + request.timeout_s
        ended = False
        try:
            while not ended:
                async with asyncio.timeout_at(deadline):
                    message = await call.items.get()
                if isinstance(message, PacelineError):
                    ended = True
                    raise message
                ended = message.finish_reason is not None
                yield message
        except TimeoutError:
            raise DeadlineExceeded(f"request {request.request_id} took longer than {request.timeout_s:g} s") from None
        finally:
            self._forget(call)
            if not ended:
                self._inbox.put(partial(self._drop, call))

    def abort(self, request_id: str, call_id: str = "", epoch: int | None = None) -> bool:
        call = self._calls.get(request_id)
        if call is None or not call.request.is_meant_by(call_id, epoch):
            return False
        self._inbox.put(partial(self._drop, call, Aborted(f"request {request_id} was aborted")))
        return True

    def info(self) -> ModelInfo:
        return self._info

    def load(self) -> Load:
        pipeline = self._pipeline
        return Load(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            kv_slots_used=self._kv.num_slots - self._kv.num_free,
            kv_slots_total=self._kv.num_slots,
            drafter_sessions=pipeline.leases() if pipeline else {},
            worker_pids=self._own_pids | (pipeline.worker_pids if pipeline else {}),
            deadline_misses=pipeline.misses if pipeline else {},
            drafts_wanted=pipeline.wanted if pipeline else 0,
            drafts_cached=pipeline.cached if pipeline else 0,
            drafts_missing=pipeline.missing if pipeline else 0,
            last_choice=self._scheduler.last_choice,
            kv_usage=self._kv.usage,
            stats=self._scheduler.meter.snapshot(),
            governor=self._scheduler.report(),
            stages=pipeline.stats() if pipeline else {},
            max_waiting=self._scheduler.max_waiting,
        )

    def health(self) -> Health:
        if self._stopped:
            return Health("stopped", False)
        if self._failure or not self._thread.is_alive():
            return Health(FAILED, False, self._failure or "the engine thread died")
        stuck = time.monotonic() - self._heartbeat
        if stuck > HEARTBEAT_LIMIT_S:
            return Health(FAILED, False, f"no step finished for {stuck:.0f} s")
        return Health("serving", True)

    def close(self) -> None:
        """Stop the thread; requests in flight end with ``EngineUnavailable``."""
        if not self._stopped:
            self._stopped = True
            self._inbox.put(None)
            self._thread.join(timeout=CLOSE_LIMIT_S)
            self._end(EngineUnavailable("the engine is stopping"))  # where the thread is stuck in a step
            if self._on_close is not None:
                self._on_close()

    def _register(self, call: _Call) -> None:
        request_id = call.request.request_id
        with self._lock:
            if self._ended is not None or self._stopped:
                raise EngineUnavailable(self._failure or "the engine is stopped")
            running = self._calls.get(request_id)
            if running is not None and not call.request.replaces(running.request):
                raise AlreadyExists(f"request_id: {request_id!r} is running already")
            self._calls[request_id] = call
            if running is not None:  # its door lost it; the engine may end before it looks into its inbox
                running.send(Aborted(f"request {request_id} goes on in another call"))
                self._inbox.put(partial(self._drop, running))
            self._inbox.put(partial(self._submit, call))  # before anybody can abort it

    def _forget(self, call: _Call) -> None:
        """The request id may be used again; what the engine thread still does for it goes by the session's own id."""
        with self._lock:
            if self._calls.get(call.request.request_id) is call:
                del self._calls[call.request.request_id]

    def _end(self, reason: PacelineError) -> None:
        """No request is accepted from here on. Those that an engine works on end with ``reason``, which may be their
        doing; those that wait had no part in it."""
        with self._lock:
            self._ended = self._ended or reason
            calls = list(self._calls.values())
            self._calls.clear()
        for call in calls:
            call.send(reason if call.begun else EngineUnavailable("the engine has stopped"))

    # --- the engine thread

    def _run(self) -> None:
        try:
            while self._handle_inbox():
                self._heartbeat = time.monotonic()
                for outcome in self._scheduler.step():
                    self._publish(outcome)
                for call in self._sessions.values():  # a session that had no part in the step may have items held back
                    self._flush(call)
                self._scheduler.study()
            reason: PacelineError = EngineUnavailable("the engine is stopping")
        except Exception as error:
            log.exception("a step failed; the engine stops")
            self._failure = f"a step failed: {type(error).__name__}: {error}"
            reason = error if isinstance(error, EngineDied) else EngineFailed(self._failure)
        self._end(reason)

    def _handle_inbox(self) -> bool:
        """Run what the doors asked for; sleep, or let drafters learn, while there is nothing to do. False: stop."""
        while True:
            try:
                sleeps = self._scheduler.idle and self._inbox.empty() and not self._scheduler.study()
                work = self._inbox.get(timeout=1.0) if sleeps else self._inbox.get_nowait()
            except queue.Empty:
                if not self._scheduler.idle:
                    return True
                self._heartbeat = time.monotonic()
                self._kv.check()
                continue
            if work is None:
                return False
            work()

    def _submit(self, call: _Call) -> None:
        try:
            call.session = Session(call.request, self._limits, self._text_of(call.request))
            outcome = self._scheduler.submit(call.session)
        except PacelineError as error:
            call.send(error)
        except Exception as error:
            log.exception("request %s cannot be begun", call.request.request_id)
            call.send(EngineFailed(f"{type(error).__name__} while the request was begun"))
        else:
            self._sessions[call.session.id] = call
            if outcome is not None:
                self._publish(outcome)

    def _drop(self, call: _Call, reason: PacelineError | None = None) -> None:
        session = call.session
        if session is None or self._sessions.pop(session.id, None) is None:
            return  # refused, or over by itself
        self._scheduler.abort(session)
        if reason is not None:
            self._flush(call, everything=True)
            call.send(reason)

    def _publish(self, outcome: Outcome) -> None:
        session = outcome.session
        over = outcome.error is not None or session.finish_reason is not None
        call = self._sessions.pop(session.id) if over else self._sessions[session.id]
        if outcome.item is not None:
            call.pacer.add(outcome.item)
        self._flush(call, everything=over)
        if outcome.error is not None:
            call.send(outcome.error)

    def _flush(self, call: _Call, everything: bool = False) -> None:
        interval = 0.0 if everything else self._pace.interval_s(len(self._sessions))
        item = call.pacer.take(time.monotonic(), interval)
        if item is not None:
            call.send(item)


def check_request(request: GenerateRequest, info: ModelInfo) -> None:
    """Raises ``InvalidArgument`` for what would fail in a step, and with it every other request, and
    ``EngineUnavailable`` for what was made for another model: its door has not noticed yet that this one took over.

    The doors check all of this too, in the client's words.
    """
    if request.model_key not in ("", info.model_key):
        raise EngineUnavailable(f"this target serves {info.model}, and the request was made for another model")
    prompt, bias = request.prompt_token_ids, [token for token, _ in request.params.logit_bias]
    if not 0 < len(prompt) < info.max_model_len:
        raise InvalidArgument("prompt", f"{len(prompt)} tokens; allowed are 1 to {info.max_model_len - 1}")
    fields = {"prompt": prompt, "resume_token_ids": request.resume_token_ids, "logit_bias": bias}
    for name, ids in fields.items():
        if ids and not (min(ids) >= 0 and max(ids) < info.vocab_size):
            raise InvalidArgument(name, f"a token id is outside [0, {info.vocab_size})")

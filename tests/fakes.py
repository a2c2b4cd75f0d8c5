"""Adversarial drafters and a misbehaving transport: what the exactness tests throw at the engine."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cluster.core.errors import UnknownSession
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin, SamplingParams
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.pipeline import ChainAsk, Deliver, Fail
from drafters.base import Ask


class ScriptedDrafter:
    """Proposes whatever ``make(tokens, ask)`` returns; keeps the life cycle honest."""

    def __init__(
        self, make: Callable[[list[int], Ask], TokenTree], stage: Origin = Origin.SMALL, vocab_size: int | None = None
    ) -> None:
        self.stage = stage
        self.vocab_size = vocab_size
        self.make = make
        self.tokens: dict[str, list[int]] = {}
        self.owners: dict[str, str] = {}
        self.ended: list[list[int]] = []
        """What the sessions that were ended had come to."""

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        self.tokens[session_id] = list(token_ids)
        self.owners[session_id] = owner

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        return {ask.session_id: self.make(self._of(ask.session_id), ask) for ask in asks}

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        self._of(session_id).extend(token_ids)

    def end(self, session_id: str) -> None:
        if session_id in self.tokens:
            self.ended.append(self.tokens.pop(session_id))

    def _of(self, session_id: str) -> list[int]:
        if session_id not in self.tokens:
            raise UnknownSession(session_id)
        return self.tokens[session_id]


class FailingDrafter(ScriptedDrafter):
    """Raises in one of its methods, every time; "propose for one" only for the session begun first, in any batch."""

    def __init__(self, make: Callable[[list[int], Ask], TokenTree], where: str) -> None:
        super().__init__(make)
        self.raised = 0
        self._where = where
        self._first = ""

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        self._first = self._first or session_id
        self._fail("begin")
        super().begin(session_id, token_ids, params, prompt_len, owner)

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        self._fail("propose")
        if any(ask.session_id == self._first for ask in asks):
            self._fail("propose for one")
        return super().propose(asks, upstream)

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        self._fail("commit")
        super().commit(session_id, token_ids)

    def end(self, session_id: str) -> None:
        super().end(session_id)
        self._fail("end")

    def _fail(self, where: str) -> None:
        if where == self._where:
            self.raised += 1
            raise ZeroDivisionError(where)


def oracle(outputs: Mapping[tuple[int, ...], Sequence[int]]) -> Callable[[list[int], Ask], TokenTree]:
    """Guesses the true continuation, by prompt."""

    def make(tokens: list[int], ask: Ask) -> TokenTree:
        for prompt, output in outputs.items():
            if tuple(tokens[: len(prompt)]) == prompt:
                left = list(output)[len(tokens) - len(prompt) :]
                return TokenTree.chain(left[: min(ask.max_nodes, ask.max_depth)], stage=Origin.SMALL)
        return TokenTree.empty()

    return make


def always_wrong(vocab_size: int) -> Callable[[list[int], Ask], TokenTree]:
    """Random rubbish with confident scores, deep and wide."""
    rng = np.random.default_rng(0)

    def make(tokens: list[int], ask: Ask) -> TokenTree:
        n = ask.max_nodes
        parents = np.array([rng.integers(-1, node) if node else -1 for node in range(n)])
        return TokenTree.build(rng.integers(0, vocab_size, n), parents, stages=int(Origin.SMALL))

    return make


def over_deep(tokens: list[int], ask: Ask) -> TokenTree:
    """A chain far deeper than the session may still grow."""
    return TokenTree.chain([tokens[-1]] * 200, stage=Origin.SMALL)


def duplicate_children(tokens: list[int], ask: Ask) -> TokenTree:
    """Every node three times."""
    n = max(3, ask.max_nodes // 3 * 3)
    parents = [-1 if node < 3 else node - 3 for node in range(n)]
    return TokenTree.build([tokens[-1]] * n, parents, stages=int(Origin.SMALL))


def empty(tokens: list[int], ask: Ask) -> TokenTree:
    return TokenTree.empty()


def malformed(kind: str) -> Callable[[list[int], Ask], TokenTree]:
    """Trees that break an invariant of ``TokenTree.check``."""

    def make(tokens: list[int], ask: Ask) -> TokenTree:
        if kind == "token":
            return TokenTree.chain([2**31 - 1], stage=1)
        if kind == "negative":
            return TokenTree.chain([-5], stage=1)
        if kind == "parent":
            return TokenTree.build([1, 2], [1, 0], stages=1)
        if kind == "stage":
            return TokenTree.chain([1], stage=9)
        if kind == "nan":
            return TokenTree.build([1], [-1], [float("nan")], 1)
        if kind == "shape":
            return TokenTree(np.zeros(3, np.int32), np.zeros(1, np.int32), np.ones(3, np.float32), np.ones(3, np.uint8))
        if kind == "huge":
            return TokenTree.chain([1] * 5000, stage=1)
        raise ValueError(kind)

    return make


MALFORMED = ("token", "negative", "parent", "stage", "nan", "shape", "huge")


class InProcessTransport:
    """``DraftTransport`` onto plain ``DraftWorker``s, with faults: drop, delay, duplicate, reorder, kill, partition.

    Calls run on threads of their own, so that replies come from another thread and in any order.
    """

    def __init__(self, workers: Mapping[str, DraftWorker], seed: int = 0) -> None:
        self.workers = dict(workers)
        self.placed: dict[tuple[str, str], DraftWorker] = {}  # (session, stage) -> another worker of that stage
        self.drop = self.duplicate = 0.0
        self.delay_s: tuple[float, float] = (0.0, 0.0)
        self.hung: set[str | DraftWorker] = set()  # stages, or single workers
        self.dead: set[str] = set()
        self.calls = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._open: dict[str, set[str]] = {}
        self._threads: list[threading.Thread] = []

    def open(self, session_id: str, stages: Sequence[str]) -> None:
        self._open[session_id] = set(stages) & set(self.workers)

    def worker(self, session_id: str, stage: str) -> DraftWorker | None:
        there = stage in self._open.get(session_id, ())
        return self.placed.get((session_id, stage), self.workers[stage]) if there else None

    def close(self, session_id: str) -> None:
        for stage in self._open.pop(session_id, ()):
            with self._lock:
                self.placed.pop((session_id, stage), self.workers[stage]).end("test", session_id)

    def stop(self) -> None:
        pass

    def leases(self) -> dict[str, int]:
        return {stage: sum(stage in stages for stages in self._open.values()) for stage in self.workers}

    def draft(self, chains: Sequence[ChainAsk], deliver: Deliver, fail: Fail) -> None:
        for chain in chains:
            self.calls += 1
            if self._random.random() < self.drop:
                continue
            copies = 2 if self._random.random() < self.duplicate else 1
            for _ in range(copies):
                thread = threading.Thread(
                    target=self._run, args=(chain, deliver, fail, self._random.uniform(*self.delay_s)), daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(timeout=10.0)

    def _run(self, chain: ChainAsk, deliver: Deliver, fail: Fail, delay: float) -> None:
        time.sleep(delay)
        reply = None
        for stage, ask in chain.asks.items():
            worker = self.placed.get((chain.session_id, stage), self.workers[stage])
            if stage in self.hung or worker in self.hung:
                return
            if stage in self.dead:
                fail(stage, worker, [chain.session_id])
                return
            with self._lock:
                if chain.session_id not in self._open:
                    return
                reply = worker.draft("test", [ask], reply)
            deliver(worker, reply)

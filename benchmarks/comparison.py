"""The measuring itself: engines take turns, chunk by chunk, while the others are stopped; every answer is a record."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from benchmarks.engines import ENGINES
from benchmarks.engines.base import Answer, Ask, Prompt, Unavailable
from benchmarks.engines.process import Worker
from benchmarks.prompts import Question, chunks

WARM_UP_TOKENS = 32
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, ``runs`` times."""

    questions: Sequence[Question]
    runs: int
    max_tokens: int
    concurrencies: Sequence[int]
    temperatures: Sequence[float]


@dataclass(frozen=True, slots=True)
class Turn:
    """One chunk, answered. ``counters``: what the engine's own counters gained meanwhile."""

    answers: list[Answer]
    seconds: float
    counters: dict[str, float]


class Comparison:
    """Drives loaded, stopped workers. ``workers``: by engine; engines of one family may share one.

    An engine that fails is left out from there on and recorded as unavailable.
    """

    def __init__(self, plan: Plan, workers: Mapping[str, Worker], record: Callable[[dict[str, Any]], None]) -> None:
        self._plan = plan
        self._workers = dict(workers)
        self._record = record
        self._turn = 0
        self._outputs: dict[tuple[float, int], tuple[str, tuple[int, ...]]] = {}
        self._seconds = 0.0  # expected of one run, as the warm-up tells
        self.mismatches: list[str] = []

    def warm_up(self) -> float:
        """Let every engine build and learn what it does at first use; the seconds a run is expected to take."""
        for concurrency in self._plan.concurrencies:
            for temperature in self._plan.temperatures:
                prompts = chunks(self._plan.questions, concurrency)[0]
                for engine in self._able(concurrency):
                    self._warm_up(engine, prompts, concurrency, temperature)
        return self._seconds

    def _warm_up(self, engine: str, questions: Sequence[Question], concurrency: int, temperature: float) -> None:
        tokens = min(WARM_UP_TOKENS, self._plan.max_tokens)
        start = time.perf_counter()
        turn = self._take_turn(_ask(engine, questions, concurrency, temperature, tokens, "warm-up"))
        if turn is None:
            return
        share = len(questions) / len(self._plan.questions)
        self._seconds += (time.perf_counter() - start) * self._plan.max_tokens / tokens / share
        speed = sum(len(answer.token_ids) for answer in turn.answers) / turn.seconds
        _say(f"warm-up: {engine:22} {concurrency:2} at once, T={temperature:g}: {speed:7.1f} tokens/s")

    def run(self, number: int) -> None:
        """Every engine on every prompt, at every concurrency and temperature; the order of the engines rotates."""
        self._probe(number)
        for concurrency in self._plan.concurrencies:
            for temperature in self._plan.temperatures:
                for part in chunks(self._plan.questions, concurrency):
                    engines = self._able(concurrency)
                    self._turn += 1
                    at = self._turn % max(len(engines), 1)
                    for engine in engines[at:] + engines[:at]:
                        self._measure(number, engine, part, concurrency, temperature)
        for engine in list(self._workers):
            self._guarded(engine, functools.partial(self._memory, engine))

    def _able(self, concurrency: int) -> list[str]:
        return [name for name in self._workers if (ENGINES[name].max_concurrency or concurrency) >= concurrency]

    def _measure(
        self, run: int, engine: str, questions: Sequence[Question], concurrency: int, temperature: float
    ) -> None:
        salt = f"run {run} {engine} {concurrency} at once, T={temperature:g}"
        turn = self._take_turn(_ask(engine, questions, concurrency, temperature, self._plan.max_tokens, salt))
        if turn is None:
            return
        cell = {"run": run, "engine": engine, "concurrency": concurrency, "temperature": temperature}
        tokens = sum(len(answer.token_ids) for answer in turn.answers)
        self._record({"kind": "chunk", **cell, "tokens": tokens, "seconds": turn.seconds, "counters": turn.counters})
        categories = {question.index: question.category for question in questions}
        for answer in sorted(turn.answers, key=lambda answer: answer.index):
            self._record(
                {
                    "kind": "answer",
                    **cell,
                    "prompt": answer.index,
                    "category": categories[answer.index],
                    "tokens": len(answer.token_ids),
                    "seconds": answer.seconds,
                    "rounds": answer.rounds,
                }
            )
            if ENGINES[engine].family.ours:
                self._compare(engine, temperature, answer)

    def _compare(self, engine: str, temperature: float, answer: Answer) -> None:
        """Ours promise the same ids with any drafter, at any concurrency, in every run and through every door."""
        first, expected = self._outputs.setdefault((temperature, answer.index), (engine, answer.token_ids))
        if answer.token_ids != expected:
            at = next((i for i, (a, b) in enumerate(zip(answer.token_ids, expected)) if a != b), None)
            where = f"from token {at}" if at is not None else "in length"
            text = f"prompt {answer.index}, T={temperature:g}: {engine} differs from {first} {where}"
            self.mismatches.append(text)
            self._record({"kind": "mismatch", "text": text})
            _say(f"error: {text}")

    def _take_turn(self, ask: Ask) -> Turn | None:
        def turn(worker: Worker) -> Turn:
            before = worker.counters(ask.engine)
            start = time.perf_counter()
            answers = worker.generate(ask)
            seconds = time.perf_counter() - start
            after = worker.counters(ask.engine)
            return Turn(answers, seconds, {name: after[name] - before.get(name, 0.0) for name in after})

        return self._guarded(ask.engine, turn)

    def _memory(self, engine: str, worker: Worker) -> None:
        self._record({"kind": "memory", "engine": engine, "peak_rss_mb": round(worker.peak_rss_mb())})

    def _probe(self, run: int) -> None:
        for worker in dict.fromkeys(self._workers.values()):
            if found := self._guarded(worker.engines[0], lambda worker: worker.probe()):
                self._record({"kind": "probe", "run": run, **found})

    def _guarded(self, engine: str, call: Callable[[Worker], T]) -> T | None:
        """``call`` on the engine's worker, awake; None where the engine is not, or no longer, available."""
        worker = self._workers.get(engine)
        if worker is None:
            return None
        worker.resume()
        try:
            return call(worker)
        except Unavailable as error:
            for name in [name for name, other in self._workers.items() if other is worker]:
                _say(f"{name} is left out from here on: {error}")
                self._record({"kind": "unavailable", "engine": name, "reason": str(error)})
                del self._workers[name]
            return None
        finally:
            worker.pause()


def _ask(
    engine: str, questions: Sequence[Question], concurrency: int, temperature: float, max_tokens: int, salt: str
) -> Ask:
    prompts = tuple(Prompt(question.index, question.token_ids) for question in questions)
    return Ask(engine, prompts, concurrency, temperature, max_tokens, salt)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

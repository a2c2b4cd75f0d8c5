"""Guesses for an engine that verifies chains and asks for them in the middle of its step: nothing here may hold it up.

The drafters' trees become chains. While the engine verifies one, they work on the text as it stood before, and send
more nodes than a chain has: where the tokens that come walk into such a tree, the next chain is a look-up. Only where
many rows have none in store does a step wait, and then for a share of its own time.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.core.token_tree import TokenTree
from cluster.rounds.calibration import Calibration, Offers, lay_out
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.rows import FORGET_AFTER_S, Row, RowText, RowTexts
from cluster.rounds.step_times import ChainLengths, StepTimes

WAIT_SHARE = 0.15  # of a step may be waited where no row has guesses in store ...
WAIT_PER_TOKEN = 0.3  # ... if guesses save steps: a row's of late, by the step
GAIN_MEMORY = 0.95
LATE_AFTER_STEPS = 3.0  # a stage silent for so long is of no use ...
LATE_AFTER_MIN_S = 0.05  # ... unless steps are this short
REMEMBERED_CALLS = 1024


@dataclass(frozen=True, slots=True)
class ChainReport:
    """Totals since start: rows for which guesses were wanted, which of those had them in store when their tokens came
    (``cached``), or had none in time (``missing``). ``seconds``: median time a step was held up, of late."""

    steps: int
    rows: int
    wanted: int
    cached: int
    missing: int
    drafted: int
    waited_s: float
    seconds: float
    worker_pids: dict[str, int]
    deadline_misses: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Lesson:
    """A step that has ended. ``seconds`` None where they tell nothing; ``outcomes``: what came, by offered chain."""

    rows: int
    drafts: int
    seconds: float | None
    offers: Offers | None
    outcomes: list[list[int] | None]


class ChainDrafter:
    """Chains for the rows of a batch, from the stages of ``pipeline``. Called by one thread.

    A thread of its own does what can wait while the engine computes: it learns from the step before, and forgets rows
    that have ended.
    """

    def __init__(
        self, pipeline: Pipeline, tree_nodes: int, clock: Callable[[], float] = time.monotonic, thread: bool = True
    ) -> None:
        """``tree_nodes``: asked for, by row. ``thread``: False leaves both to calls of ``learn`` and ``reap``."""
        self._pipeline = pipeline
        self._tree_nodes = tree_nodes
        self._clock = clock
        self._lock = threading.Lock()
        self._texts = RowTexts()
        self._calibration = Calibration()
        self._times = StepTimes()
        self._lengths = ChainLengths(self._times)
        self._offers: Offers | None = None
        self._lessons: deque[_Lesson] = deque(maxlen=8)
        self._bases: dict[str, int] = {}  # of the rows of the last step
        self._gain = 1.0  # guesses accepted, by row that had some, of late
        self._drafts = 0
        self._ended_s = self._reaped_s = -math.inf
        self._steps = self._rows = self._drafted = 0
        self._waited_s = 0.0
        self._calls: deque[float] = deque(maxlen=REMEMBERED_CALLS)
        self._wake = threading.Event()
        if thread:
            threading.Thread(target=self._work, name="chain-drafter", daemon=True).start()

    def propose(self, rows: Sequence[Row]) -> list[list[int]]:
        """Guesses for each row; none for most of them where that is faster."""
        start = self._clock()
        with self._lock:
            followed = self._texts.follow(rows, start)
            texts = [text for text, _ in followed if text is not None]
            self._look_back(rows, texts, any(new for _, new in followed), start)
            for text, new in followed:
                if new and text is not None:
                    self._pipeline.open(text, self._pipeline.stages)
            chains = self._chains(texts, len(rows))
            by_text = dict(zip((text.id for text in texts), chains))
            self._drafts = sum(map(len, chains))
            self._steps += 1
            self._rows += len(texts)
            self._drafted += self._drafts
            self._ended_s = self._clock()
            self._calls.append(self._ended_s - start)
            self._wake.set()
            return [by_text.get(text.id, []) if text is not None else [] for text, _ in followed]

    def report(self) -> ChainReport:
        pipeline = self._pipeline
        with self._lock:
            seconds = statistics.median(self._calls) if self._calls else 0.0
            return ChainReport(
                steps=self._steps,
                rows=self._rows,
                wanted=pipeline.wanted,
                cached=pipeline.cached,
                missing=pipeline.missing,
                drafted=self._drafted,
                waited_s=self._waited_s,
                seconds=seconds,
                worker_pids=dict(pipeline.worker_pids),
                deadline_misses=pipeline.misses,
            )

    def reap(self) -> None:
        """Let the workers of rows that have ended go."""
        with self._lock:
            self._reaped_s = self._clock()
            for text in self._texts.forget(self._clock()):
                self._pipeline.close(text.id)
                self._calibration.forget(text.id)

    def learn(self) -> None:
        """From the steps that have ended since: what they took, and which guesses they bore out."""
        with self._lock:
            while self._lessons:
                lesson = self._lessons.popleft()
                if lesson.seconds is not None:
                    self._times.observe(lesson.rows, lesson.drafts, lesson.seconds)
                if lesson.offers is not None:
                    self._calibration.observe(lesson.offers, lesson.outcomes)
                    for outcome in filter(None, lesson.outcomes):
                        self._gain += (1.0 - GAIN_MEMORY) * (len(outcome) - 1 - self._gain)

    def _look_back(self, rows: Sequence[Row], texts: Sequence[RowText], fresh: bool, now: float) -> None:
        """Note the step that has just ended. One that read prompts, or came after a pause, tells nothing of time."""
        emitted = {text.id: text.tokens[self._bases[text.id] :] for text in texts if text.id in self._bases}
        steady = not fresh and len(rows) == len(texts) == len(self._bases) == len(emitted)
        outcomes = [emitted.get(name) for name in self._offers.names] if self._offers is not None else []
        seconds = now - self._ended_s if steady else None
        self._lessons.append(_Lesson(len(rows), self._drafts, seconds, self._offers, outcomes))
        self._offers = None
        self._bases = {text.id: text.base for text in texts}

    def _chains(self, texts: Sequence[RowText], rows: int) -> list[list[int]]:
        """``rows``: of the step, also those that want no guesses."""
        trees = self._trees(texts, rows)
        best = {text.id: best_chain(trees[text.id], text.max_drafts) for text in texts if text.id in trees}
        offered = {name: chain for name, chain in best.items() if len(chain)}
        if not offered:
            return [[] for _ in texts]
        self._offers = lay_out(list(offered), list(offered.values()))
        scores = [path.tolist() for path in self._calibration.scores(self._offers)]
        lengths = dict(zip(offered, self._lengths.choose(rows, scores)))
        for name, length in lengths.items():
            self._pipeline.verified(name, offered[name].take(np.arange(length)))
        return [offered[t.id].tokens[: lengths[t.id]].tolist() if t.id in offered else [] for t in texts]

    def _trees(self, texts: Sequence[RowText], rows: int) -> dict[str, TokenTree]:
        pipeline, step_s = self._pipeline, self._times.seconds(rows, 0)
        pipeline.ask([(text, pipeline.stages, self._tree_nodes) for text in texts])
        waiting = sum(pipeline.awaits(text.id, math.inf) for text in texts)
        start = self._clock()
        patience = min(WAIT_SHARE, WAIT_PER_TOKEN * self._gain) * step_s * waiting / max(1, len(texts))
        if pipeline.reply_s > patience:  # it would pass before most replies are there
            patience = 0.0
        trees = pipeline.collect(texts, patience, max(LATE_AFTER_STEPS * step_s, LATE_AFTER_MIN_S))
        self._waited_s += self._clock() - start
        return trees

    def _work(self) -> None:
        while True:  # vLLM tells nobody that it ends
            if self._wake.wait(FORGET_AFTER_S / 2):
                self._wake.clear()
                self.learn()
            if self._clock() - self._reaped_s > FORGET_AFTER_S / 2:
                self.reap()


def best_chain(tree: TokenTree, max_depth: int) -> TokenTree:
    """The path of best children, from the root down, as a tree."""
    scores = tree.scores.tolist()
    best: dict[int, int] = {}
    for node, parent in enumerate(tree.parents.tolist()):
        if parent not in best or scores[node] > scores[best[parent]]:
            best[parent] = node
    path: list[int] = []
    node = -1
    while node in best and len(path) < max_depth:
        node = best[node]
        path.append(node)
    return tree.take(np.array(path, np.int64))

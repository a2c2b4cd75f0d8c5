"""Guesses for an engine that verifies chains and asks for them in the middle of its step: nothing here may hold it up.

The drafters' trees become chains. Those of a local drafter are made within the call. Remote stages work while the
engine verifies, on the text as it stood before, and send more nodes than a chain has: where the tokens that come walk
into such a tree, the next chain is a look-up. Only where many rows have none in store does a step wait, and then for a
share of its own time. Local drafter, remote stages or no guesses: whichever is fastest is used. Where it is the remote
stages, the local drafter fills in for missing trees.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.core.token_tree import TokenTree
from cluster.rounds.calibration import Calibration, Offer
from cluster.rounds.local_drafter import LocalDrafter
from cluster.rounds.modes import LEARNING_ROUNDS, LOCAL, MIN_ROUNDS, MIXED, PLAIN, REMOTE, ModeChooser
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.remote_use import RemoteUse
from cluster.rounds.rows import FORGET_AFTER_S, Row, RowText, RowTexts
from cluster.rounds.step_times import ChainLengths, StepTimes

log = logging.getLogger(__name__)

WAIT_SHARE = 0.15  # of a step may be waited where no row has guesses in store ...
WAIT_PER_TOKEN = 0.3  # ... if guesses save steps: a row's of late, by the step
GAIN_MEMORY = 0.95
LATE_AFTER_STEPS = 3.0  # a stage silent for so long is of no use ...
LATE_AFTER_MIN_S = 0.05  # ... unless steps are this short
REMEMBERED_CALLS = 1024
STEP_NODES = 4096  # asked of remote stages for all rows: many rows have smaller trees, that these come in time
LEARN_EVERY_S = 0.1  # not after each step: a call that wakes a thread may lose its core to it
MAX_LESSONS = 64


@dataclass(frozen=True, slots=True)
class ChainReport:
    """Totals since start. ``stages``: what may guess, by where it is. ``wanted``: rows for which remote stages were
    asked, which of those had guesses in store when their tokens came (``cached``), or had none in time (``missing``);
    where there are no remote stages, a local drafter's. ``remote_steps``: that remote stages guessed for. ``seconds``:
    median time a step was held up, of late."""

    stages: dict[str, tuple[str, ...]]
    steps: int
    remote_steps: int
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
    """A step that has ended: ``mode``, its guesses' way; ``tokens``, what each row gained. ``seconds`` of the engine,
    and ``total_s`` with the call before it, are None where they tell nothing; ``outcomes``: what came, by offered
    chain."""

    mode: str
    rows: int
    drafts: int
    tokens: float
    seconds: float | None
    total_s: float | None
    offers: list[Offer]
    outcomes: list[list[int] | None]


class ChainDrafter:
    """Chains for the rows of a batch. Called by one thread.

    A thread of its own does what can wait while the engine computes: it learns from the step before, and forgets rows
    that have ended.
    """

    def __init__(
        self,
        local: LocalDrafter | None,
        always: bool = False,
        clock: Callable[[], float] = time.monotonic,
        thread: bool = True,
    ) -> None:
        """``local``: guesses within the call. ``always``: use remote stages whether they are faster or not. ``thread``:
        False leaves its work to calls of ``learn`` and ``reap``."""
        self._local = local
        self._always = always
        self._remote: Pipeline | None = None
        self._clock = clock
        self._modes: dict[int, ModeChooser] = {}  # by load
        self._way = self._choice(None)
        self._lock = threading.Lock()
        self._texts = RowTexts()
        self._calibration = Calibration()
        # Remote drafting slows steps down for reasons of its own: those beside which none goes on are the yardstick.
        self._alone = StepTimes()
        self._times = self._alone if local is not None else StepTimes()  # of steps that verify guesses
        self._lengths = ChainLengths(self._times)
        self._offers: list[Offer] = []
        self._lessons: deque[_Lesson] = deque(maxlen=MAX_LESSONS)
        self._last_rows = 0
        self._bases: dict[str, int] = {}  # of the last step's rows that want guesses
        self._gain = 1.0  # guesses accepted, by row that had some, of late
        self._drafts = 0
        self._begun_s = self._ended_s = self._reaped_s = -math.inf
        self._steps = self._remote_steps = self._rows = self._drafted = 0
        self._waited_s = 0.0
        self._calls: deque[float] = deque(maxlen=REMEMBERED_CALLS)
        self._wake = threading.Event()
        if thread:
            threading.Thread(target=self._work, name="chain-drafter", daemon=True).start()

    def join(self, remote: Pipeline) -> None:
        """From now on these stages in other processes may guess, too. From any thread."""
        with self._lock:
            self._remote = remote
            self._way = self._choice(remote)
            for text in self._texts:
                remote.open(text, ())

    def propose(self, rows: Sequence[Row]) -> list[list[int]]:
        """Guesses for each row; none for most of them where that is faster."""
        start = self._clock()
        with self._lock:
            followed = self._texts.follow(rows, start)
            texts = [text for text, _ in followed if text is not None]
            for text, new in followed:
                if new and text is not None:
                    self._open(text)
            self._look_back(rows, texts, any(new for _, new in followed), start)
            chains = self._chains(texts, len(rows))
            by_text = dict(zip((text.id for text in texts), chains))
            self._drafts = sum(map(len, chains))
            self._steps += 1
            self._remote_steps += self._mode == REMOTE
            self._rows += len(texts)
            self._drafted += self._drafts
            self._begun_s, self._ended_s = start, self._clock()
            self._calls.append(self._ended_s - start)
            self._wake.set()
            return [by_text.get(text.id, []) if text is not None else [] for text, _ in followed]

    def report(self) -> ChainReport:
        with self._lock:
            sources = {LOCAL: self._local, REMOTE: self._remote}
            remote = self._remote
            asked = remote or self._local
            return ChainReport(
                stages={where: source.stages for where, source in sources.items() if source is not None},
                steps=self._steps,
                remote_steps=self._remote_steps,
                rows=self._rows,
                wanted=asked.wanted if asked else 0,
                cached=remote.cached if remote else 0,
                missing=asked.missing if asked else 0,
                drafted=self._drafted,
                waited_s=self._waited_s,
                seconds=statistics.median(self._calls) if self._calls else 0.0,
                worker_pids=dict(remote.worker_pids) if remote else {},
                deadline_misses=remote.misses if remote else {},
            )

    def reap(self) -> None:
        """Let the workers of rows that have ended go."""
        with self._lock:
            self._reaped_s = self._clock()
            for text in self._texts.forget(self._clock(), self._begun_s):
                if self._local is not None:
                    self._local.close(text.id)
                if self._remote is not None:
                    self._remote.close(text.id)
                self._calibration.forget(text.id)

    def learn(self) -> None:
        """From the steps that have ended since: what they took, and which guesses they bore out."""
        with self._lock:
            while self._lessons:
                self._learn(self._lessons.popleft())

    @property
    def _mode(self) -> str:
        return self._way.mode

    def _choice(self, remote: Pipeline | None) -> RemoteUse:
        usual = [PLAIN] if self._local is None else [LOCAL, PLAIN]
        return RemoteUse(self._speeds(1), usual, remote, self._clock, always=self._always)

    def _speeds(self, rows: int) -> ModeChooser:
        """Of the ways with so many rows: what is fastest for one need not be for many, whose guesses take longer to
        verify."""
        load = rows.bit_length()
        if load not in self._modes:
            self._modes[load] = ModeChooser(max(MIN_ROUNDS, LEARNING_ROUNDS // max(1, rows)))
        return self._modes[load]

    def _open(self, text: RowText) -> None:
        if self._local is not None:
            self._local.open(text)
        if self._remote is not None:
            self._remote.open(text, ())  # workers are leased when they are worth it

    def _learn(self, lesson: _Lesson) -> None:
        if lesson.seconds is not None and lesson.total_s is not None:
            alone = lesson.mode in (PLAIN, LOCAL)
            if alone or self._local is None:
                times = self._alone if alone else self._times
                times.observe(lesson.rows, lesson.drafts, lesson.seconds)
            if self._alone.known and lesson.mode != MIXED:
                steps = lesson.total_s / self._alone.seconds(lesson.rows, 0)
                self._speeds(lesson.rows).observe(lesson.mode, lesson.tokens, steps)
        if lesson.offers:
            self._calibration.observe(lesson.offers, lesson.outcomes)
            for outcome in filter(None, lesson.outcomes):
                self._gain += (1.0 - GAIN_MEMORY) * (len(outcome) - 1 - self._gain)

    def _look_back(self, rows: Sequence[Row], texts: Sequence[RowText], fresh: bool, now: float) -> None:
        """Note the step that has just ended. One that read prompts, or came after a pause, tells nothing of time."""
        emitted = {text.id: text.tokens[self._bases[text.id] :] for text in texts if text.id in self._bases}
        alike = len(rows) == self._last_rows and len(texts) == len(self._bases) == len(emitted) > 0
        steady = alike and not fresh and all(row.new for row in rows)
        outcomes = [emitted.get(offer.session_id) for offer in self._offers]
        self._lessons.append(
            _Lesson(
                mode=self._mode,
                rows=len(rows),
                drafts=self._drafts,
                tokens=sum(row.new for row in rows) / max(1, len(rows)),
                seconds=now - self._ended_s if steady else None,
                total_s=now - self._begun_s if steady else None,
                offers=self._offers,
                outcomes=outcomes,
            )
        )
        self._offers = []
        self._last_rows = len(rows)
        self._bases = {text.id: text.base for text in texts}

    def _chains(self, texts: Sequence[RowText], rows: int) -> list[list[int]]:
        """``rows``: of the step, also those that want no guesses."""
        nodes = max(1, STEP_NODES // max(1, len(texts)))
        self._way.modes = self._speeds(rows)
        self._way.ask([(text, nodes) for text in texts])
        remote = self._remote_trees(texts, rows)
        others = [text for text in texts if text.id not in remote]
        local = self._local if self._mode != PLAIN else None
        trees = remote | (local.trees(others) if local is not None and others else {})
        best = {text.id: best_chain(trees[text.id], text.max_drafts) for text in texts if text.id in trees}
        offered = {row_id: chain for row_id, chain in best.items() if len(chain)}
        if not offered:
            return [[] for _ in texts]
        self._offers = list(map(Offer.of, offered, offered.values()))
        lengths = dict(zip(offered, self._lengths.choose(rows, self._calibration.scores(self._offers))))
        for row_id, length in lengths.items():
            if self._remote is not None and row_id in remote:
                self._remote.verified(row_id, offered[row_id].take(np.arange(length)))
        return [offered[t.id].tokens[: lengths[t.id]].tolist() if t.id in offered else [] for t in texts]

    def _remote_trees(self, texts: Sequence[RowText], rows: int) -> dict[str, TokenTree]:
        """Of rows that have any in time: what was found below the tokens that came, or came while the step waited."""
        if self._remote is None or not texts:
            return {}
        pipeline, step_s = self._remote, self._times.seconds(rows, 0)
        waiting = sum(pipeline.awaits(text.id, math.inf) for text in texts)
        start = self._clock()
        patience = min(WAIT_SHARE, WAIT_PER_TOKEN * self._gain) * step_s * waiting / len(texts)
        if pipeline.reply_s > patience:  # it would pass before most replies are there
            patience = 0.0
        trees = pipeline.collect(texts, patience, max(LATE_AFTER_STEPS * step_s, LATE_AFTER_MIN_S))
        self._waited_s += self._clock() - start
        return {row_id: tree for row_id, tree in trees.items() if len(tree)}

    def _work(self) -> None:
        while True:  # vLLM tells nobody that it ends
            woken = self._wake.wait(FORGET_AFTER_S / 2)
            self._wake.clear()
            try:
                self.learn()
                if self._clock() - self._reaped_s > FORGET_AFTER_S / 2:
                    self.reap()
            except Exception:  # one bad lesson must not leave ended rows with their workers for ever
                log.exception("looking after rows failed")
            if woken:
                time.sleep(LEARN_EVERY_S)


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

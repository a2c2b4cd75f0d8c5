"""From rounds of the real engine to the prices of the simulated one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.simulation.prices import StepPrice, rows_cost
from benchmarks.simulation.target import shape_of
from cluster.core.accept import Accepted
from cluster.core.errors import EngineFailed
from cluster.engine.step_cost import CostCurve
from cluster.engine.verifier import Prefill, Verifier, Verify, VerifySpent
from cluster.rounds.governor import RoundSpent, Shape
from cluster.rounds.scheduler import Scheduler

PROMPT_ROWS = np.arange(0.4, 1.61, 0.05)
FAR_OFF = 3.0  # a step that took so many times what the others of its kind did was interrupted: it shapes no price
MOST_NOISE = 0.3


@dataclass(frozen=True, slots=True)
class Sample:
    """One real round. Of ``draft`` seconds the drafter itself took ``asked``."""

    shape: Shape
    draft: float
    asked: float
    forward: float
    rest: float


@dataclass(slots=True)
class Watch:
    """Notes the rounds of a scheduler from now on. ``outside``: seconds between its steps, which the caller adds."""

    samples: list[Sample] = field(default_factory=list)
    outside: float = 0.0
    asks: int = 0
    ask_seconds: float = 0.0
    _shape: Shape | None = None
    _asked: float = 0.0

    def attach(self, scheduler: Scheduler) -> None:
        verifier, governor = scheduler._verifier, scheduler.governor
        self._wrap(verifier, "step", self._step(verifier))
        self._wrap(governor, "observe", self._observe(governor.observe))
        self._wrap(governor.gate, "asked", self._count(governor.gate.asked))

    @property
    def seconds(self) -> float:
        return sum(one.draft + one.forward + one.rest for one in self.samples)

    def _wrap(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        setattr(owner, name, method)

    def _step(self, verifier: Verifier) -> Callable[..., Any]:
        step = verifier.step

        def noted(
            prefills: Sequence[Prefill], verifies: Sequence[Verify]
        ) -> tuple[list[Accepted | EngineFailed], VerifySpent]:
            self._shape = shape_of(prefills, verifies, verifier.rank.kv.length)
            return step(prefills, verifies)

        return noted

    def _observe(self, observe: Callable[..., None]) -> Callable[..., None]:
        def noted(mode: str, shape: Shape, tokens: int, spent: RoundSpent) -> None:
            assert self._shape is not None
            rest = spent.total - spent.draft - spent.forward
            self.samples.append(Sample(self._shape, spent.draft, self._asked, spent.forward, rest))
            self._asked = 0.0
            observe(mode, shape, tokens, spent)

        return noted

    def _count(self, asked: Callable[[int, float], None]) -> Callable[[int, float], None]:
        def noted(sessions: int, seconds: float) -> None:
            self.asks += sessions
            self.ask_seconds += seconds
            self._asked += seconds
            asked(sessions, seconds)

        return noted


def fit_forward(samples: Sequence[Sample], curve: CostCurve) -> StepPrice:
    """``factor``, ``position``, ``prompt_row`` and ``noise`` by least squares of relative errors."""
    best: tuple[float, StepPrice] | None = None
    observed = np.array([one.forward for one in samples])
    behind = np.array([one.shape.context * max(1, one.shape.sessions) for one in samples])
    for prompt_row in PROMPT_ROWS.tolist():
        base = np.array([_base(curve, one.shape, prompt_row) for one in samples])
        ratio = observed / base
        usual = ratio < FAR_OFF * np.median(ratio)
        factor, position = _non_negative(np.stack([np.ones_like(base), behind / base], axis=1)[usual], ratio[usual])
        left = np.log(ratio[usual] / np.maximum(factor + position * (behind / base)[usual], 1e-9))
        error = float(np.abs(left).mean())
        if best is None or error < best[0]:
            noise = min(MOST_NOISE, float(left.std()))
            best = error, StepPrice(curve, factor, position, prompt_row, noise=noise)
    assert best is not None
    return at_level(best[1], samples)


def at_level(price: StepPrice, samples: Sequence[Sample]) -> StepPrice:
    """``price`` scaled so that the steps of ``samples`` take as long as they took, interruptions included."""
    level = sum(one.forward for one in samples) / sum(price.forward(one.shape) for one in samples)
    spread = float(np.exp(price.noise**2 / 2))  # the mean of what noise multiplies by
    return replace(price, factor=price.factor * level / spread, position=price.position * level / spread)


def fit_rest(price: StepPrice, watch: Watch) -> StepPrice:
    """``price`` with what a round takes before and after the forward pass, by sessions and rows."""
    samples = watch.samples
    sessions = np.array([one.shape.sessions for one in samples], float)
    rows = sessions + np.array([one.shape.nodes for one in samples])
    ones = np.ones_like(rows)
    choosing = _non_negative(np.stack([ones, sessions], axis=1), np.array([one.draft - one.asked for one in samples]))
    rest = _non_negative(np.stack([ones, sessions, rows], axis=1), np.array([one.rest for one in samples]))
    return replace(
        price,
        choosing=choosing[0],
        choosing_session=choosing[1],
        rest=rest[0] + watch.outside / len(samples),
        rest_session=rest[1],
        rest_row=rest[2],
    )


def _base(curve: CostCurve, shape: Shape, prompt_row: float) -> float:
    return rows_cost(curve, shape.sessions + shape.nodes + prompt_row * shape.prompt_rows)


def _non_negative(columns: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> list[float]:
    """Least squares without negative coefficients, whose columns are left out one by one."""
    used = list(range(columns.shape[1]))
    while True:
        found = np.linalg.lstsq(columns[:, used], values, rcond=None)[0]
        if (found >= 0.0).all() or len(used) == 1:
            result = [0.0] * columns.shape[1]
            for place, value in zip(used, found.tolist()):
                result[place] = max(0.0, value)
            return result
        used.pop(int(np.argmin(found)))

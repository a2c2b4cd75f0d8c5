"""What things cost in a simulated deployment: steps of the target, and calls of a draft worker. Seconds throughout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cluster.engine.step_cost import CostCurve
from cluster.rounds.governor import Shape

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


@dataclass(frozen=True, slots=True)
class StepPrice:
    """A target's round.

    curve: of a forward pass by rows. factor: how much slower service is than the curve. position: added by every
    committed position of every session in the step (its K/V is read). prompt_row: of a row in rows of the curve; prompt
    tokens want no logits. choosing, choosing_session: before the forward pass, fixed and for each session that decodes.
    rest, rest_session, rest_row: after it (walks, text, queues). noise: standard deviation of a step's log.
    """

    curve: CostCurve
    factor: float = 1.0
    position: float = 0.0
    prompt_row: float = 1.0
    choosing: float = 0.0
    choosing_session: float = 0.0
    rest: float = 0.0
    rest_session: float = 0.0
    rest_row: float = 0.0
    noise: float = 0.0

    def forward(self, shape: Shape) -> float:
        rows = shape.sessions + shape.nodes + self.prompt_row * shape.prompt_rows
        behind = shape.context * max(1, shape.sessions)
        return self.factor * rows_cost(self.curve, rows) + self.position * behind

    def choose(self, sessions: int) -> float:
        return self.choosing + self.choosing_session * sessions

    def commit(self, shape: Shape) -> float:
        return self.rest + self.rest_session * shape.sessions + self.rest_row * (shape.sessions + shape.nodes)


@dataclass(frozen=True, slots=True)
class DraftPrice:
    """A drafter's call.

    call, session: fixed, and for each session that wants a tree. curve: of a forward pass of its model; None for one
    that computes nothing. passes: forward passes a call, the first over new tokens; rows: of a session in each further
    pass.
    """

    call: float = 0.0
    session: float = 0.0
    curve: CostCurve | None = None
    passes: int = 0
    rows: int = 0

    def seconds(self, sessions: int, new_tokens: int) -> float:
        """Of a call in which ``sessions`` want trees, and ``new_tokens`` committed ones are yet to be read."""
        total = self.call + self.session * sessions
        if self.curve is not None:
            total += rows_cost(self.curve, new_tokens) if new_tokens else 0.0
            if sessions:
                total += max(0, self.passes - 1) * rows_cost(self.curve, sessions * self.rows)
        return total


def rows_cost(curve: CostCurve, rows: float) -> float:
    """Seconds of ``rows`` rows; more than the curve's widest step are so many of these."""
    widest = curve.rows[-1]
    whole, rest = divmod(max(rows, 1.0), widest)
    seconds = whole * curve.seconds[-1]
    if rest or not whole:
        seconds += float(np.interp(rest, curve.rows, curve.seconds))
    return seconds


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Facts):
    """What a forward pass of a transformer moves and computes. ``width`` is its hidden size."""

    parameters: float = Field(gt=0)
    layers: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    width: int = Field(ge=1)
    bytes_per_weight: float = Field(default=2.0, gt=0)

    @property
    def kv_bytes(self) -> float:
        """Of one position."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * 2.0


class Machine(_Facts):
    """Accelerators that share one model. Peak bandwidth (bytes/s) and FLOP/s of each, and what share of it is reached.

    all_reduce: seconds of one, two of which end each layer where ``count`` > 1; link: bytes/s of what it carries.
    launch: seconds of a step that are neither memory nor arithmetic.
    """

    bandwidth: float = Field(gt=0)
    flops: float = Field(gt=0)
    count: int = Field(default=1, ge=1)
    bandwidth_share: float = Field(default=0.8, gt=0, le=1)
    flops_share: float = Field(default=0.5, gt=0, le=1)
    all_reduce: float = Field(default=12e-6, ge=0)
    link: float = Field(default=150e9, gt=0)
    launch: float = Field(default=0.3e-3, ge=0)


def roofline(model: Model, machine: Machine, max_rows: int) -> CostCurve:
    """The curve of steps by memory traffic or arithmetic, whichever takes longer, plus launch and all-reduces."""
    widths = (*(width for width in WIDTHS if width < max_rows), max_rows)
    memory = model.parameters * model.bytes_per_weight / (machine.count * machine.bandwidth * machine.bandwidth_share)
    per_row = 2.0 * model.parameters / (machine.count * machine.flops * machine.flops_share)
    reduce_row = 2 * model.layers * 2.0 * model.width / machine.link if machine.count > 1 else 0.0
    fixed = machine.launch + (2 * model.layers * machine.all_reduce if machine.count > 1 else 0.0)
    seconds = tuple(max(memory, per_row * rows) + fixed + reduce_row * rows for rows in widths)
    slope = position_seconds(model, machine)
    return CostCurve(widths, seconds, (slope,) * len(widths), 0, slope)


def position_seconds(model: Model, machine: Machine) -> float:
    """Seconds in which the K/V of one position of one session is read."""
    return model.kv_bytes / (machine.count * machine.bandwidth * machine.bandwidth_share)

"""What is simulated, as a file says it: frozen, validated once, unknown keys refused. Names in ``_s`` are seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from benchmarks.simulation.prices import DraftPrice, Machine, Model, StepPrice, position_seconds, roofline
from benchmarks.simulation.traces import Trace, load_trace, synthetic
from cluster.core.config import EngineConfig
from cluster.core.errors import ConfigError
from cluster.core.types import STAGE_NAMES
from cluster.engine.step_cost import CostCurve, load_curve

FOLDER = Path(__file__).resolve().parents[1]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class CurveConfig(_Config):
    """A cost curve: a file the engine measured, figures, or what follows from a model's and a machine's."""

    file: Path | None = Field(default=None, description="as the engine keeps it in ~/.cache/paceline/cost")
    rows: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    slopes: tuple[float, ...] = Field(default=(), description="seconds a position adds, as the governor believes")
    context: int = Field(default=0, ge=0, description="positions behind which seconds were measured")
    session_slope: float = Field(default=0.0, ge=0.0, description="what a position adds for every further session")
    model: Model | None = None
    machine: Machine | None = None

    @model_validator(mode="after")
    def _one_source(self) -> CurveConfig:
        given = [self.file is not None, bool(self.rows), self.model is not None]
        if sum(given) != 1:
            raise ValueError("one of file, rows with seconds, model with machine is needed")
        if len(self.rows) != len(self.seconds) or len(self.rows) == 1 or len(self.slopes) not in (0, len(self.rows)):
            raise ValueError("rows, seconds and slopes (if any): equally many, two at least")
        if list(self.rows) != sorted(set(self.rows)):
            raise ValueError("rows: must ascend")
        if (self.model is None) != (self.machine is None):
            raise ValueError("model and machine come together")
        return self

    def curve(self, max_rows: int) -> CostCurve:
        """Raises ``ConfigError`` for a file that holds no curve."""
        if self.model is not None and self.machine is not None:
            return roofline(self.model, self.machine, max_rows)
        if self.file is None:
            return CostCurve(self.rows, self.seconds, self.slopes, self.context, self.session_slope)
        curve = load_curve(self.file)
        if curve is None:
            raise ConfigError(f"curve.file: {self.file} holds no cost curve")
        return curve

    @property
    def position(self) -> float:
        """Seconds that each committed position of a session adds."""
        return position_seconds(self.model, self.machine) if self.model and self.machine else 0.0


class TraceConfig(_Config):
    """Acceptance: a recorded trace, or drafters whose k-th guess at a place is right with chance ``rates[k]``."""

    file: Path | None = None
    rates: tuple[float, ...] = ()
    depth: int = Field(default=6, ge=1, le=32)
    holds: float = Field(default=1.0, ge=0.0, le=1.0, description="share of the rates that is true")

    @model_validator(mode="after")
    def _one_source(self) -> TraceConfig:
        if (self.file is None) == (not self.rates):
            raise ValueError("either file or rates is needed")
        if any(not 0.0 < rate < 1.0 for rate in self.rates) or sum(self.rates) > 1.0:
            raise ValueError("rates: each between 0 and 1, and 1 at most together")
        if list(self.rates) != sorted(self.rates, reverse=True):
            raise ValueError("rates: must not rise")
        return self

    def trace(self, seed: int) -> Trace:
        """Raises ``ConfigError`` for a file that holds no trace. Those in ``benchmarks/traces`` need no folder."""
        if self.file is None:
            return synthetic(self.rates, self.depth, holds=self.holds, seed=seed)
        return load_trace(self.file if self.file.exists() else FOLDER / "traces" / self.file)


class TargetConfig(_Config):
    """``replicas`` of one target, each with ``engine``. The prices are those of ``StepPrice``."""

    replicas: int = Field(default=1, ge=1)
    curve: CurveConfig
    engine: EngineConfig = EngineConfig()
    factor: float = Field(default=1.0, gt=0.0)
    position_s: float | None = Field(default=None, ge=0.0, description="None: the roofline's, 0 for other curves")
    prompt_row: float = Field(default=1.0, gt=0.0)
    choosing_s: tuple[float, float] = (0.0, 0.0)
    rest_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    noise: float = Field(default=0.0, ge=0.0)

    def price(self) -> StepPrice:
        curve = self.curve.curve(self.engine.max_rows)
        position = self.curve.position if self.position_s is None else self.position_s
        return StepPrice(curve, self.factor, position, self.prompt_row, *self.choosing_s, *self.rest_s, self.noise)


class LocalDrafterConfig(_Config):
    """The drafter in the engine's own thread: seconds a call and for each session of it."""

    trace: TraceConfig
    call_s: float = Field(default=0.0, ge=0.0)
    session_s: float = Field(default=0.1e-3, ge=0.0)

    def price(self) -> DraftPrice:
        return DraftPrice(self.call_s, self.session_s)


class PoolConfig(_Config):
    """A remote stage: ``workers`` that all targets share."""

    name: str
    workers: int = Field(ge=1)
    trace: TraceConfig
    max_sessions: int = Field(default=64, ge=1, description="of one worker")
    curve: CurveConfig | None = Field(default=None, description="of the drafter's model; None: it has none")
    passes: int = Field(default=4, ge=0)
    rows: int = Field(default=4, ge=1, description="of a session in each pass after the first")
    call_s: float = Field(default=0.3e-3, ge=0.0)
    session_s: float = Field(default=0.05e-3, ge=0.0)

    @model_validator(mode="after")
    def _known_name(self) -> PoolConfig:
        if self.name not in STAGE_NAMES:
            raise ValueError(f"name: {self.name!r} is not one of {', '.join(STAGE_NAMES)}")
        return self

    def price(self) -> DraftPrice:
        curve = self.curve.curve(512) if self.curve else None
        return DraftPrice(self.call_s, self.session_s, curve, self.passes, self.rows)


class NetworkConfig(_Config):
    """Between targets and draft workers; defaults as measured between Ray actors of one machine."""

    hop_s: float = Field(default=0.9e-3, ge=0.0, description="one way, median")
    jitter: float = Field(default=0.2, ge=0.0, description="standard deviation of its log")
    lease_s: float = Field(default=20e-3, ge=0.0)


class WorkloadConfig(_Config):
    """``requests`` for every target: ``sessions`` at a time (closed loop), or ``rate`` a second (Poisson)."""

    requests: int = Field(ge=1)
    sessions: int | None = Field(default=None, ge=1)
    rate: float | None = Field(default=None, gt=0.0)
    prompt_tokens: tuple[int, ...] = Field(default=(256,), min_length=1, description="in turn")
    output_tokens: tuple[int, ...] = Field(default=(128,), min_length=1, description="in turn")

    @model_validator(mode="after")
    def _one_arrival(self) -> WorkloadConfig:
        if (self.sessions is None) == (self.rate is None):
            raise ValueError("either sessions or rate is needed")
        if min(self.prompt_tokens) < 1 or min(self.output_tokens) < 1:
            raise ValueError("prompt_tokens, output_tokens: 1 at least")
        return self


class FaultConfig(_Config):
    """At ``at_s`` a stage's worker dies (for ``for_s``, or for good) or hangs (for ``for_s``)."""

    at_s: float = Field(ge=0.0)
    stage: str
    worker: int = Field(default=0, ge=0)
    kind: Literal["death", "hang"] = "death"
    for_s: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _hangs_end(self) -> FaultConfig:
        if self.kind == "hang" and self.for_s is None:
            raise ValueError("for_s: a hang needs its length")
        return self


class Deployment(_Config):
    """Everything that is simulated."""

    seed: int = Field(default=0, ge=0)
    target: TargetConfig
    local_drafter: LocalDrafterConfig | None = None
    stages: tuple[PoolConfig, ...] = ()
    network: NetworkConfig = NetworkConfig()
    workload: WorkloadConfig
    faults: tuple[FaultConfig, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Deployment:
        workers = {stage.name: stage.workers for stage in self.stages}
        if len(workers) < len(self.stages):
            raise ValueError("stages: names must differ")
        for fault in self.faults:
            if fault.worker >= workers.get(fault.stage, 0):
                raise ValueError(f"faults: there is no worker {fault.worker} of stage {fault.stage!r}")
        longest = max(self.workload.prompt_tokens) + max(self.workload.output_tokens)
        if longest > self.target.engine.max_model_len:
            raise ValueError(f"workload: {longest} tokens exceed target.engine.max_model_len")
        return self


def read_file(path: Path) -> dict[str, Any]:
    """A deployment's keys, from YAML or JSON. Raises ``ConfigError`` where there are none."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a deployment is a mapping, not {type(data).__name__}")
    return data


def changed(data: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """``data`` with settings like ``workload.sessions=8`` applied. Raises ``ConfigError`` for one of another form."""
    data = json.loads(json.dumps(data))
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign:
            raise ConfigError(f"--set {setting}: NAME=VALUE is needed")
        *parents, last = name.split(".")
        try:
            at: Any = data
            for parent in parents:
                at = at[int(parent)] if isinstance(at, list) else at.setdefault(parent, {})
            at[int(last) if isinstance(at, list) else last] = yaml.safe_load(value)
        except (AttributeError, IndexError, TypeError, ValueError):
            raise ConfigError(f"--set {setting}: there is no such key") from None
    return data


def described(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """A line for each key: its name, type, default and meaning."""
    lines = []
    for name, info in kind.model_fields.items():
        inner = next((part for part in (info.annotation, *_parts(info.annotation)) if _is_config(part)), None)
        place = f"{prefix}{name}"
        if inner is not None:
            many = ".0" if info.annotation is not inner and "tuple" in str(info.annotation) else ""
            lines += described(inner, f"{place}{many}.")
            continue
        default = "required" if info.is_required() else json.dumps(info.get_default(), default=str)
        lines.append(f"{place:44}{default}" + (f"  {info.description}" if info.description else ""))
    return lines


def _parts(annotation: Any) -> list[Any]:
    return [inner for part in get_args(annotation) for inner in (part, *_parts(part))]


def _is_config(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)

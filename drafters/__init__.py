"""Every way of guessing, by name. Adding one: ``docs/add_a_drafter.md``.

Heavy imports stand inside the factories, so that a worker that runs SSSD alone never loads torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.core.config import Dtype, ModelConfig, StageConfig, parse_config
from cluster.core.errors import ConfigError
from cluster.core.types import Origin
from drafters.base import Ask, Drafter
from drafters.options import (
    DraftModelOptions,
    GrowthOptions,
    MlpOptions,
    S3DOptions,
    SssdOptions,
    StagedOptions,
    SwiftOptions,
)

if TYPE_CHECKING:
    from cluster.engine.model_config import DecoderConfig
    from cluster.engine.rank import Rank
    from cluster.engine.tensor_parallel import Recruiter

__all__ = ["Ask", "Drafter", "TargetFacts", "create", "reads_target"]


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What a drafter must know of the target. ``folder`` and ``dtype`` are the weights of stages that name none."""

    vocab_size: int
    max_model_len: int
    folder: Path
    dtype: Dtype = "bfloat16"


@dataclass(frozen=True, slots=True)
class _Site:
    """Where a drafter is to run: for which target, and on the target's own rank where that is given."""

    target: TargetFacts
    rank: Rank | None
    slot_of: Callable[[str], int | None] | None
    recruiter: Recruiter | None


def create(
    stage: StageConfig,
    *,
    target: TargetFacts,
    rank: Rank | None = None,
    slot_of: Callable[[str], int | None] | None = None,
    recruiter: Recruiter | None = None,
) -> Drafter:
    """The drafter a stage's configuration names, its weights loaded.

    ``rank`` and ``slot_of`` (session id -> the target's slot, None where it has none) are given together, in the
    target's process: a drafter that is the target in disguise then runs there, without weights of its own. Without
    ``recruiter`` a model drafter has one rank.
    Raises ``ConfigError`` for an unknown option, a wrong value, or a vocabulary that is not the target's.
    """
    if (rank is None) != (slot_of is None):
        raise ConfigError("rank and slot_of come together")
    factory = _FACTORIES.get(stage.drafter)
    if factory is None:
        raise ConfigError(f"drafter {stage.drafter!r} is not one of {', '.join(_FACTORIES)}")
    return factory(stage, _Site(target, rank, slot_of, recruiter))


def reads_target(stage: StageConfig) -> bool:
    """Whether the drafter, in a process of its own, takes weights from the target, which may be large. All take its
    configuration and tokenizer."""
    if stage.drafter == "sssd":
        return False
    if stage.drafter == "staged":
        return any(map(reads_target, _parts(stage, parse_config(StagedOptions, stage.options))))
    from drafters.distilled import is_draft

    return stage.model is None or is_draft(stage.model.source)


def _sssd(stage: StageConfig, site: _Site) -> Drafter:
    from drafters.datastore import open_when_ready
    from drafters.live_store import LiveStores
    from drafters.shipped_store import find_store
    from drafters.sssd import SssdDrafter

    options = parse_config(SssdOptions, stage.options)
    live = LiveStores(site.target.vocab_size) if options.live else None
    drafter = SssdDrafter(options, max_sessions=stage.max_sessions, stage=_origin(stage), live=live)
    folder = find_store(options.store, site.target.vocab_size, site.target.folder) if options.store else None
    if folder is not None:
        open_when_ready(folder, drafter.use)
    return drafter


def _draft_model(stage: StageConfig, site: _Site) -> Drafter:
    from drafters.draft_model import ModelDrafter, OwnSlots

    options = parse_config(DraftModelOptions, stage.options)
    rank, max_len = _own_rank(stage, site, options, any_vocabulary=options.translate)
    slots = OwnSlots(rank.kv, options.prefill_chunk)
    drafter = ModelDrafter(rank, slots, options, max_len=max_len, stage=_origin(stage))
    return _translated(drafter, stage, site) if options.translate else drafter


def _translated(drafter: Drafter, stage: StageConfig, site: _Site) -> Drafter:
    from cluster.engine.weights import resolve_model
    from drafters.shipped import read_tokenizer
    from drafters.translated import TranslatedDrafter

    if stage.model is None:
        raise ConfigError("translate: the stage names no model of its own; allowed: false")
    folders = resolve_model(stage.model.source), site.target.folder
    own, target = map(read_tokenizer, folders)
    if own is None or target is None:
        raise ConfigError(f"translate: {folders[own is not None]} has no tokenizer.json")
    return TranslatedDrafter(drafter, own, target, site.target.vocab_size)


def _swift(stage: StageConfig, site: _Site) -> Drafter:
    from drafters.swift import SwiftDrafter

    options = parse_config(SwiftOptions, stage.options)
    if site.rank is not None:
        return SwiftDrafter(
            site.rank, options, max_len=site.target.max_model_len, stage=_origin(stage), slot_of=site.slot_of
        )
    rank, max_len = _own_rank(stage, site, options)
    return SwiftDrafter(rank, options, max_len=max_len, stage=_origin(stage))


def _s3d(stage: StageConfig, site: _Site) -> Drafter:
    from drafters.s3d import S3DDrafter
    from drafters.s3d_adapter import S3DAdapter, find_adapter
    from drafters.shipped import tokenizer_of

    options = parse_config(S3DOptions, stage.options)
    rank, slot_of = _targets_rank(stage, site)
    folder = find_adapter(options.adapter, rank.config, site.target.folder)
    adapter = S3DAdapter.load(folder, rank.config, tokenizer_of(site.target.folder))
    max_len = site.target.max_model_len
    return S3DDrafter(rank, adapter, options, max_len=max_len, slot_of=slot_of, stage=_origin(stage))


def _mlp_speculator(stage: StageConfig, site: _Site) -> Drafter:
    from drafters.mlp_head import find_head
    from drafters.mlp_speculator import MlpSpeculator, load_mlp

    options = parse_config(MlpOptions, stage.options)
    rank, slot_of = _targets_rank(stage, site)
    head = load_mlp(find_head(options.head, site.target.folder), site.target.folder, rank)
    return MlpSpeculator(rank, slot_of, head, options, stage=_origin(stage))


def _staged(stage: StageConfig, site: _Site) -> Drafter:
    from drafters.staged import StagedDrafter

    options = parse_config(StagedOptions, stage.options)
    small, medium = (
        create(part, target=site.target, rank=site.rank, slot_of=site.slot_of) for part in _parts(stage, options)
    )
    return StagedDrafter(small, medium, small_nodes=options.small_nodes)


def _parts(stage: StageConfig, options: StagedOptions) -> list[StageConfig]:
    return [
        parse_config(StageConfig, {"name": name, "max_sessions": stage.max_sessions, **part})
        for name, part in (("small", options.small), ("medium", options.medium))
    ]


_FACTORIES: dict[str, Callable[[StageConfig, _Site], Drafter]] = {
    "sssd": _sssd,
    "draft_model": _draft_model,
    "swift": _swift,
    "s3d": _s3d,
    "mlp_speculator": _mlp_speculator,
    "staged": _staged,
}


def _origin(stage: StageConfig) -> Origin:
    return Origin[stage.name.upper()]


def _targets_rank(stage: StageConfig, site: _Site) -> tuple[Rank, Callable[[str], int | None]]:
    if site.rank is None or site.slot_of is None:
        raise ConfigError(
            f"drafter: {stage.drafter} runs in the target's process alone; allowed: local_drafter, or a stage of it"
        )
    return site.rank, site.slot_of


def _own_rank(
    stage: StageConfig, site: _Site, options: GrowthOptions, any_vocabulary: bool = False
) -> tuple[Rank, int]:
    """Load a rank of the drafter's own, maybe the first of several; returns it with the positions it can take."""
    from cluster.engine.kernels import choose_kernels
    from cluster.engine.rank import check_window, rank_of
    from cluster.engine.tensor_parallel import load_rank
    from cluster.engine.weights import read_config, resolve_model
    from drafters.distilled import find_draft, load_draft

    target = site.target
    model = stage.model or ModelConfig(source=str(target.folder), dtype=target.dtype)
    size, draft = model.tensor_parallel_size, find_draft(model.source, target.folder)
    if size != 1 and draft is not None:
        raise ConfigError(f"model.tensor_parallel_size: {size} is not for distilled models; allowed: 1")
    scratch = options.prefill_chunk + options.guess_rows
    if draft is not None:
        kernels = choose_kernels(model.kernels, model.dtype, model.threads)
        config, weights, head_tokens = load_draft(draft, target.folder, kernels.dtype)
        max_len = _positions(config, target)
        check_window(config, max_len)
        sizes = {"num_slots": stage.max_sessions, "capacity": max_len, "scratch": scratch}
        return rank_of(config, weights, kernels, **sizes, head_tokens=head_tokens), max_len
    folder = resolve_model(model.source)
    config = read_config(folder)
    if config.vocab_size != target.vocab_size and not any_vocabulary:
        raise ConfigError(
            f"model.source: {model.source} has a vocabulary of {config.vocab_size} tokens, the target in"
            f" {target.folder} one of {target.vocab_size}; a draft_model with the option translate may"
        )
    max_len = _positions(config, target)
    sizes = {"num_slots": stage.max_sessions, "capacity": max_len, "scratch": scratch}
    return load_rank(folder, model, site.recruiter, **sizes), max_len


def _positions(config: DecoderConfig, target: TargetFacts) -> int:
    """How many a drafter with that model can take."""
    return min(target.max_model_len, config.max_positions, config.sliding_window or target.max_model_len)

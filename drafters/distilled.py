"""A distilled draft model on disk: low-rank addends to some of the target's layers, and a head over part of its tokens.

``drafters/training/distill.py`` makes such a folder. It is small because most of the model is the target's: embeddings,
the layers' matrices and the head's rows are read from the target's own folder and the addends added in, once, at load.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cluster.core.errors import ConfigError
from cluster.engine.model_config import DecoderConfig, read_config
from cluster.engine.weights import load_weights
from drafters.shipped import DEFAULT, find_folder, tokenizer_of

HEADER = "draft.json"
TENSORS = "draft.safetensors"
FORMAT = 1
LINEARS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class DraftHeader:
    """Which target the addends belong to, and to which of its layers."""

    tokenizer_hash: str | None
    layers: tuple[int, ...]
    provenance: dict[str, Any]
    format: int = FORMAT

    @staticmethod
    def read(folder: Path) -> DraftHeader:
        """Raises ``ConfigError`` where there is none, or one this version cannot read."""
        path = folder / HEADER
        try:
            header = DraftHeader(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"draft model: {path} does not read: {error}") from None
        if header.format != FORMAT:
            raise ConfigError(f"draft model: {path} has format {header.format}; allowed: {FORMAT}")
        return replace(header, layers=tuple(header.layers))


def save_draft(
    folder: Path, header: DraftHeader, values: Mapping[str, torch.Tensor], head_tokens: torch.Tensor
) -> None:
    """values: trained tensors by name, ``layers.0.mlp.up_proj.a``, kept in bf16; head_tokens: (n,) ids, rising.

    An older draft in ``folder`` is replaced file by file: one that is being loaded meanwhile may fail to load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in values.items()}
    tensors["head_tokens"] = head_tokens.to(torch.int32)
    partial = folder / f".{TENSORS}"
    save_file(tensors, partial)
    os.replace(partial, folder / TENSORS)
    (folder / HEADER).write_text(json.dumps(asdict(header), indent=1) + "\n")


def is_draft(source: str) -> bool:
    """Whether ``source`` names a distilled model, which is nothing without its target."""
    return source == DEFAULT or (Path(source).expanduser() / HEADER).is_file()


def find_draft(source: str, target: Path) -> Path | None:
    """The folder of the distilled model that ``source`` names; None where it names a model of another kind.

    ``default`` is the one shipped for the tokenizer of the target in ``target``. Raises ``ConfigError`` where none is.
    """
    if not is_draft(source):
        return None
    return find_folder(
        source,
        f"draft/{HEADER}",
        lambda folder: DraftHeader.read(folder).tokenizer_hash == tokenizer_of(target),
        f"model.source: no draft model is shipped for the tokenizer of {target}; allowed: a model's folder, or one that"
        " drafters.training.distill made",
    )


def load_draft(
    folder: Path, target: Path, dtype: torch.dtype
) -> tuple[DecoderConfig, dict[str, torch.Tensor], torch.Tensor]:
    """The draft model's configuration, its tensors by stock names, and the ids its head knows, (n,) int64.

    Raises ``ConfigError`` where ``target`` is not the model it was made from.
    """
    header = DraftHeader.read(folder)
    if header.tokenizer_hash != tokenizer_of(target):
        raise ConfigError(f"draft model: {folder} was made for another tokenizer than that of {target}")
    config = read_config(target)
    if max(header.layers) >= config.num_layers:
        raise ConfigError(f"draft model: {folder} wants layer {max(header.layers)} of {target}, which has none")
    whole = load_weights(target, config, torch.float32, layers=header.layers)
    trained = load_file(folder / TENSORS)
    head_tokens = trained.pop("head_tokens").long()
    small = replace(config, num_layers=len(header.layers), tie_word_embeddings=False)
    try:
        weights = {name: tensor.to(dtype) for name, tensor in _merged(whole, trained, header.layers, config)}
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"draft model: {folder} does not fit {target}: {error}") from None
    head = whole["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    weights["lm_head.weight"] = head[head_tokens].to(dtype)
    return small, weights, head_tokens


def _merged(
    whole: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    layers: tuple[int, ...],
    config: DecoderConfig,
) -> list[tuple[str, torch.Tensor]]:
    """The kept layers under their new numbers, addends added in fp32."""
    merged = [
        ("model.embed_tokens.weight", whole["model.embed_tokens.weight"]),
        ("model.norm.weight", trained["norm.weight"]),
    ]
    for index, layer in enumerate(layers):
        old, new, own = f"model.layers.{layer}.", f"model.layers.{index}.", f"layers.{index}."
        for name in (name for name in whole if name.startswith(old)):
            part = name.removeprefix(old)
            stem = part.removesuffix(".weight")
            tensor = whole[name]
            if stem in NORMS:
                tensor = trained[own + part]
            elif stem in LINEARS and part.endswith(".weight"):
                tensor = tensor + trained[f"{own}{stem}.b"].float() @ trained[f"{own}{stem}.a"].float()
            merged.append((new + part, tensor))
    return merged

"""What S3D adds to a target, and the folder it is kept in: masks' embeddings and low-rank adapters of kept layers.

A folder holds ``header.json`` (``S3DHeader``: whose adapter it is, which layers it keeps, how it was made) and
``adapter.safetensors`` (bf16, by the names ``S3DShape.sizes`` lists). ``drafters/training/train_s3d.py`` makes one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cluster.core.errors import ConfigError
from cluster.engine.model_config import DecoderConfig
from drafters.shipped import find_folder, tokenizer_of

HEADER, TENSORS, FORMAT = "header.json", "adapter.safetensors", 1


@dataclass(frozen=True, slots=True)
class S3DShape:
    """Which layers a draft pass runs, the first ``bottom`` and the last ``top`` of ``num_layers``, and what it adds.

    gamma: tokens guessed in one pass; rank: of the adapters; head_size: the first tokens of the vocabulary, which the
    draft's head knows. A vocabulary of merges begins with the commonest, and the target's own head, read up to there,
    takes no memory.
    """

    num_layers: int
    bottom: int
    top: int
    gamma: int
    rank: int
    head_size: int

    @property
    def kept(self) -> tuple[int, ...]:
        return (*range(self.bottom), *range(self.num_layers - self.top, self.num_layers))

    @property
    def skip(self) -> frozenset[int]:
        """Sub-layers left out, numbered as the decoder numbers them."""
        return frozenset(range(2 * self.bottom, 2 * (self.num_layers - self.top)))

    def sizes(self, config: DecoderConfig) -> dict[str, tuple[int, int]]:
        """Every tensor's name and size. Adapters add ``outer @ (inner @ x)``; gate's outputs stand before up's."""
        hidden, inner, queries = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
        linears = {
            "qkv": (hidden, queries + 2 * config.num_kv_heads * config.head_dim),
            "out": (queries, hidden),
            "gate_up": (hidden, 2 * inner),
            "down": (inner, hidden),
        }
        sizes: dict[str, tuple[int, int]] = {"masks": (self.gamma - 1, hidden)}
        for layer in self.kept:
            for part, (inputs, outputs) in linears.items():
                sizes[f"layers.{layer}.{part}.inner"] = (self.rank, inputs)
                sizes[f"layers.{layer}.{part}.outer"] = (outputs, self.rank)
        return sizes


@dataclass(frozen=True, slots=True)
class S3DHeader:
    """Whose adapter it is, and its shape. ``provenance`` is free-form."""

    vocab_size: int
    tokenizer_hash: str | None
    shape: S3DShape
    provenance: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> S3DHeader:
        """Raises ``ConfigError`` where ``folder`` holds no adapter of this format."""
        try:
            fields = json.loads((folder / HEADER).read_text())
            if fields["format"] != FORMAT:
                raise ConfigError(f"adapter: {folder} has format {fields['format']}, this version reads {FORMAT}")
            return cls(**{**fields, "shape": S3DShape(**fields["shape"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"adapter: {folder} is not an S3D adapter: {error!r}") from None

    def fits(self, config: DecoderConfig, tokenizer_hash: str | None) -> bool:
        return (
            self.vocab_size == config.vocab_size
            and self.shape.num_layers == config.num_layers
            and tokenizer_hash in (None, self.tokenizer_hash)
        )


@dataclass(frozen=True, slots=True)
class S3DAdapter:
    """An adapter in memory. tensors: by the names of ``S3DShape.sizes``."""

    header: S3DHeader
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def load(cls, folder: Path, config: DecoderConfig, tokenizer_hash: str | None) -> S3DAdapter:
        """Raises ``ConfigError`` where the folder holds no adapter of this target."""
        header = S3DHeader.read(folder)
        if not header.fits(config, tokenizer_hash):
            raise ConfigError(
                f"adapter: {folder} was made for {header.shape.num_layers} layers, {header.vocab_size} tokens and"
                f" tokenizer {header.tokenizer_hash}; the target has {config.num_layers}, {config.vocab_size} and"
                f" {tokenizer_hash}"
            )
        if not 1 <= header.shape.head_size <= config.vocab_size:
            raise ConfigError(
                f"adapter: {folder} has head_size {header.shape.head_size}; allowed: 1 to {config.vocab_size},"
                " the target's tokens"
            )
        try:
            tensors = load_file(folder / TENSORS)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"adapter: {folder / TENSORS} does not load: {error}") from None
        sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wrong = sorted(name for name, size in header.shape.sizes(config).items() if sizes.get(name) != size)
        if wrong:
            raise ConfigError(f"adapter: {folder} lacks {len(wrong)} tensors of the right size, among them {wrong[:3]}")
        return cls(header, tensors)

    @property
    def low_rank(self) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
        """The adapters as ``DraftView`` takes them: (layer, linear) -> inner and outer."""
        pairs: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in self.header.shape.kept:
            for part in ("qkv", "out", "gate_up", "down"):
                name = f"layers.{layer}.{part}"
                pairs[layer, part] = self.tensors[f"{name}.inner"], self.tensors[f"{name}.outer"]
        return pairs

    def save(self, folder: Path) -> None:
        """What stood in ``folder`` is replaced file by file: one that is being loaded meanwhile may fail to load."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in self.tensors.items()}
        save_file(tensors, folder / f".{TENSORS}")
        (folder / f".{HEADER}").write_text(json.dumps(asdict(self.header), indent=2) + "\n")
        for name in (TENSORS, HEADER):
            os.replace(folder / f".{name}", folder / name)


def find_adapter(name: str, config: DecoderConfig, model_folder: Path) -> Path:
    """The folder of the adapter ``name``; ``default`` is the one shipped for the target in ``model_folder``.

    Raises ``ConfigError`` where none is shipped.
    """

    def fits(folder: Path) -> bool:
        tokenizer = tokenizer_of(model_folder)
        return tokenizer is not None and S3DHeader.read(folder).fits(config, tokenizer)

    missing = f"adapter: none is shipped for the target in {model_folder}; drafters.training.train_s3d makes one"
    return find_folder(name, f"s3d/{HEADER}", fits, missing)

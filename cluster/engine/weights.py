"""From a model folder to tensors: configuration, weights, tokenizer, end-of-text ids.

A model folder is what transformers writes: config.json, tokenizer files, one or several ``*.safetensors``.
``resolve_model`` makes one of every other kind of source.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cluster.core.errors import ConfigError
from cluster.engine.model_config import DecoderConfig, decoder_config_from_hf, read_config
from cluster.engine.model_source import resolve_model
from cluster.engine.shard import Shard

__all__ = [
    "decoder_config_from_hf",
    "eos_token_ids",
    "load_tokenizer",
    "load_weights",
    "output_rows",
    "read_config",
    "resolve_model",
]

WHOLE = Shard()
STORED = ("F64", "F32", "BF16", "F16")
"""What weights may be stored as. Quantised ones have the stock names, too, but mean nothing without their scales."""


def load_weights(
    folder: Path,
    config: DecoderConfig,
    dtype: torch.dtype,
    shard: Shard = WHOLE,
    layers: Iterable[int] | None = None,
) -> dict[str, torch.Tensor]:
    """All tensors the decoder needs, by their stock names, converted to ``dtype``; of each, the shard's part only.

    ``config`` is the whole model's; ``layers``: those that are wanted, None for all. Raises ``ConfigError`` naming
    tensors that are missing, quantised, or of another shape than the configuration says.
    """
    expected = dict(_expected_shapes(config, range(config.num_layers) if layers is None else layers))
    weights: dict[str, torch.Tensor] = {}
    found: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in expected.keys() & set(tensors.keys()):
                found.add(name)
                stored = tensors.get_slice(name)
                if stored.get_dtype() not in STORED:
                    kinds = f"{stored.get_dtype()} in {folder}; allowed: {', '.join(STORED)}, not quantised"
                    raise ConfigError(f"model: {name} is {kinds}")
                if tuple(stored.get_shape()) != expected[name]:
                    shapes = f"{tuple(stored.get_shape())} in {folder}, config.json says {expected[name]}"
                    raise ConfigError(f"model: {name} is {shapes}")
                cut = shard.cut(name, config)
                if cut is not None:
                    part = tensors.get_tensor(name) if shard == WHOLE else stored[cut]
                    weights[name] = part.to(dtype).contiguous()
    missing = sorted(expected.keys() - found)
    if missing:
        raise ConfigError(f"model: {folder}/*.safetensors lack {len(missing)} tensors, among them {missing[:3]}")
    return weights


def output_rows(folder: Path, config: DecoderConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Rows ``tokens`` of the output head as stored: (n, hidden). Raises ``ConfigError`` where the head is missing."""
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name in set(tensors.keys()):
                rows: torch.Tensor = tensors.get_tensor(name)[tokens]
                return rows
    raise ConfigError(f"model: {folder}/*.safetensors lack {name}")


def _expected_shapes(config: DecoderConfig, layers: Iterable[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
    linears = [
        *((f"self_attn.{part}_proj", out, hidden, config.qkv_bias) for part, out in zip("qkv", (queries, keys, keys))),
        ("self_attn.o_proj", hidden, queries, config.out_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    ]
    for layer in layers:
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", (hidden,)
        if config.qk_norm:
            yield f"{prefix}.self_attn.q_norm.weight", (dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (dim,)
        for name, outputs, inputs, bias in linears:
            yield f"{prefix}.{name}.weight", (outputs, inputs)
            if bias:
                yield f"{prefix}.{name}.bias", (outputs,)


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer (a transformers object, untyped)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a text: generation_config.json's where it names some, config.json's otherwise."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()

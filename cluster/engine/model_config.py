"""``DecoderConfig``: what the decoder needs to know of a model, and which models it can run.

Numbers come from a transformers configuration, so that defaults and RoPE initialisation agree with the stock models.
Whatever the decoder would compute differently from the stock model is refused here, before any weight is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.core.errors import ConfigError

ARCHITECTURES = {"llama": "Llama (SmolLM too)", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
ROPE_KINDS = ("default", "linear", "llama3")
ACTIVATIONS = ("silu", "swish")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shapes and constants of a Llama-like decoder.

    inv_freq: head_dim / 2 rotary frequencies; rope_scaling multiplies the cosines and sines.
    max_positions: positions the model was trained for; sliding_window: positions a key stays visible, None for all.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    inv_freq: tuple[float, ...]
    rope_scaling: float
    max_positions: int
    tie_word_embeddings: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None


def _require(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{key}: {value!r} is not supported; allowed: {allowed}")


def _require_architecture(kind: object) -> None:
    supported = ", ".join(f"{key} = {name}" for key, name in ARCHITECTURES.items())
    _require(kind in ARCHITECTURES, "model_type", kind, supported)


def _rope(config: Any, head_dim: int) -> tuple[tuple[float, ...], float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    _require(kind in ROPE_KINDS, "rope_parameters.rope_type", kind, ", ".join(ROPE_KINDS))
    partial = parameters.get("partial_rotary_factor", 1.0)
    _require(partial == 1.0, "rope_parameters.partial_rotary_factor", partial, "1.0")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return tuple((1.0 / (parameters["rope_theta"] ** exponents)).tolist()), 1.0
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config)
    return tuple(inv_freq.tolist()), float(scaling)


def decoder_config_from_hf(config: Any) -> DecoderConfig:
    """From a transformers configuration. Raises ``ConfigError`` naming the key, its value and what is allowed."""
    kind = config.model_type
    _require_architecture(kind)
    _require(config.hidden_act in ACTIVATIONS, "hidden_act", config.hidden_act, ", ".join(ACTIVATIONS))
    split = getattr(config, "pretraining_tp", None) or 1
    _require(split == 1, "pretraining_tp", split, "1")
    attention_bias = bool(getattr(config, "attention_bias", False))
    mlp_bias = bool(getattr(config, "mlp_bias", False))
    _require(not attention_bias or kind in ("llama", "qwen3"), "attention_bias", True, f"false for {kind}")
    _require(not mlp_bias or kind == "llama", "mlp_bias", True, f"false for {kind}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    _require(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of {heads} heads")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    _require(head_dim % 2 == 0 and head_dim <= 512, "head_dim", head_dim, "an even number up to 512")
    inv_freq, rope_scaling = _rope(config, head_dim)
    layer_types = set(getattr(config, "layer_types", None) or ())
    windowed = kind == "mistral" if not layer_types else "sliding_attention" in layer_types
    _require(
        layer_types <= {"full_attention", "sliding_attention"}, "layer_types", sorted(layer_types), "full_attention"
    )
    return DecoderConfig(
        architecture=kind,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=config.rms_norm_eps,
        inv_freq=inv_freq,
        rope_scaling=rope_scaling,
        max_positions=config.max_position_embeddings,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=attention_bias or kind == "qwen2",
        out_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=kind == "qwen3",
        sliding_window=getattr(config, "sliding_window", None) if windowed else None,
    )


def read_config(folder: Path) -> DecoderConfig:
    """The configuration in ``folder/config.json``. Raises ``ConfigError``, also for an unsupported architecture."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"model: {folder} holds no config.json; needed: config.json, tokenizer files, *.safetensors")
    # Asked before transformers parses the file: it raises its own, longer error for a kind it does not know.
    _require_architecture(json.loads(path.read_text()).get("model_type"))
    return decoder_config_from_hf(AutoConfig.from_pretrained(folder))

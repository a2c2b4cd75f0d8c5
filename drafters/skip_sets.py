"""Skip sets in files: those shipped for a target, those found for others by ``drafters.training.search_skip``.

A set is a file ``COUNT.json`` in a folder: the model's shape, the sub-layers, their matchness, and how they were found.
A set for other weights of the same shape would cost speed only, so the shape is all that is compared.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from cluster.core.errors import ConfigError
from cluster.engine.model_config import DecoderConfig
from drafters.shipped import ARTIFACTS, DEFAULT

log = logging.getLogger(__name__)

SHAPE = ("num_layers", "hidden_size", "vocab_size")


def shape_of(config: DecoderConfig) -> dict[str, int]:
    """The same on every rank of a target."""
    return {name: int(getattr(config, name)) for name in SHAPE}


def find_set(folder: str, config: DecoderConfig, count: int) -> frozenset[int] | None:
    """The set of ``count`` sub-layers in ``folder``; ``default`` stands for whatever is shipped for such a model.

    None where none is shipped. Raises ``ConfigError`` where a named folder has none for this model.
    """
    if folder != DEFAULT:
        path = Path(folder).expanduser() / f"{count}.json"
        if not path.is_file():
            raise ConfigError(f"sets: there is no {path}; python -m drafters.training.search_skip makes one")
        return _read(path, config, count)
    for path in sorted(ARTIFACTS.glob(f"*/swift/{count}.json")):
        if json.loads(path.read_text())["shape"] == shape_of(config):
            return _read(path, config, count)
    log.info("swift: no set of %d sub-layers is shipped for this model", count)
    return None


def write_set(path: Path, config: DecoderConfig, skip: frozenset[int], facts: dict[str, Any]) -> None:
    """``facts``: its matchness, and how it was found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"shape": shape_of(config), "count": len(skip), "skip": sorted(skip), **facts}
    path.write_text(json.dumps(content) + "\n")


def _read(path: Path, config: DecoderConfig, count: int) -> frozenset[int]:
    content = json.loads(path.read_text())
    skip, shape = frozenset(content.get("skip", ())), content.get("shape")
    inner = range(2, 2 * config.num_layers - 2)
    if shape != shape_of(config) or len(skip) != count or not skip.issubset(inner):
        raise ConfigError(f"sets: {path} holds {len(skip)} sub-layers of {shape}, not {count} of {shape_of(config)}")
    return skip

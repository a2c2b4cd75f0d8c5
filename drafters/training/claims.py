"""Whose saved state it is: noted with the state, so that a run goes on with its own and with no other's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.core.errors import ConfigError


def refuse_others(place: str, there: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raises ``ConfigError`` where ``there``, noted in ``place``, is not ``run``; what only ``there`` has is passed
    over. place: the option and its value."""
    if other := [name for name in run if there.get(name) != run[name]]:
        raise ConfigError(f"{place} holds a run of another {' and '.join(other)}; allowed: its own, or a new one")


def claim(place: str, note: Path, run: Mapping[str, Any]) -> None:
    """Note in the file ``note`` whose states are kept beside it. run: as JSON keeps it, so no tuples.

    Raises ``ConfigError`` where they are another run's.
    """
    if note.is_file():
        refuse_others(place, json.loads(note.read_text()), run)
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    write_whole(note, json.dumps(run))


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: who breaks off in between leaves the older one."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    os.replace(partial, path)


def model_digest(folder: Path) -> str:
    return hashlib.sha256(f"{folder.resolve()}\0{(folder / 'config.json').read_text()}".encode()).hexdigest()[:20]


def text_digest(texts: Iterable[Sequence[int]]) -> str:
    """Of token ids, and of what places in them matter, text by text."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(np.array(text, np.int64).tobytes())
    return digest.hexdigest()[:20]

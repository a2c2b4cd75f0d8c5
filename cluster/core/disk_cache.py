"""Where Paceline keeps what it made once: converted models, compiled kernels, indexes, cost curves."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """``$PACELINE_CACHE/kind``, or ``~/.cache/paceline/kind``; created if missing."""
    root = os.environ.get("PACELINE_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "paceline") / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder

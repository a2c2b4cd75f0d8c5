"""Where Paceline keeps what it made once: converted models, compiled kernels, indexes, cost curves."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """``$PACELINE_CACHE/kind``, or ``~/.cache/paceline/kind``; created if missing. Where that is not allowed, who
    writes there finds out, and whoever can do without goes on."""
    root = os.environ.get("PACELINE_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "paceline") / kind
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder

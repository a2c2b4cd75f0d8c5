"""Compiles a C++ source of ours into a shared library, once per source, flags and machine. No torch."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster.core.disk_cache import cache_folder

log = logging.getLogger(__name__)


class NativeUnavailable(Exception):
    """Native code cannot run here; the message says why."""


def build_library(sources: Sequence[Path], flags: Sequence[str], machine: Sequence[str] = ()) -> Path:
    """The library compiled from ``sources[0]``, which may include the others; built unless it is in the cache.

    ``machine`` names what the result depends on beside sources and flags, for example the CPU's features.
    Processes that build at once each rename a finished file into place, so none ever loads half of one.
    Raises ``NativeUnavailable`` where there is no compiler, or it fails, or the cache cannot be written.
    """
    try:
        return _build(sources, flags, machine)
    except OSError as error:
        raise NativeUnavailable(f"{sources[0].name} cannot be built: {error}") from error


def _build(sources: Sequence[Path], flags: Sequence[str], machine: Sequence[str]) -> Path:
    key = [*(source.read_text() for source in sources), *flags, platform.machine(), *machine]
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:20]
    target = cache_folder("kernels") / f"{sources[0].stem}-{digest}.so"
    if target.exists():
        return target
    compiler = shutil.which("g++")
    if compiler is None:
        raise NativeUnavailable("no g++ was found")
    log.info("compiling %s", sources[0].name)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        library = f"{work}/library.so"
        command = [compiler, *flags, str(sources[0]), "-o", library]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise NativeUnavailable(f"{compiler} failed: {result.stderr.strip()[:500]}")
        os.replace(library, target)
    return target

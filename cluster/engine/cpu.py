"""What the system says of this machine's CPU."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


def cpu_name() -> str:
    """The CPU's model."""
    return _field("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Its features, by Linux's names for them on x86; empty elsewhere."""
    return frozenset(_field("flags").split())


@functools.cache
def _field(name: str) -> str:
    """A field of the first core in Linux's ``/proc/cpuinfo``; "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields if key.strip() == name), "")

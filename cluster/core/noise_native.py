"""``philox.cpp`` from Python: built on first use, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.core.native_build import NativeUnavailable, build_library

log = logging.getLogger(__name__)

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where it cannot be built: numpy draws the same bits, more slowly."""
    try:
        loaded = ctypes.CDLL(str(build_library((Path(__file__).with_name("philox.cpp"),), FLAGS)))
    except (NativeUnavailable, OSError) as error:
        log.info("noise is drawn by numpy: %s", error)
        return None
    loaded.philox_blocks.argtypes = (
        *(ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32),
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p),
    )
    loaded.philox_blocks.restype = None
    return loaded


def philox_blocks(
    native: ctypes.CDLL, seed: int, position: int, choice: int, blocks: npt.NDArray[Any]
) -> npt.NDArray[np.uint32]:
    """(n, 4) uint32: the bits of counters (position, choice, block, 0) under ``seed``; blocks: (n,) ints >= 0."""
    blocks = np.ascontiguousarray(blocks, np.int64)
    out = np.empty((len(blocks), 4), np.uint32)
    native.philox_blocks(
        seed, position & 0xFFFFFFFF, choice & 0xFFFFFFFF, blocks.ctypes.data, len(blocks), out.ctypes.data
    )
    return out

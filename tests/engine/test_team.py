"""The threads of the native kernels (``cluster/engine/team.h``): a late one holds nobody up, and changes nothing."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

from cluster.core.native_build import NativeUnavailable, build_library
from cluster.engine.kernels_native import _usable_flags

OPERATIONS, COUNT = 12, 64
LATE, SLEEP_MS = 4, 300


@pytest.fixture(scope="module")
def driver():
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    try:
        machine = sorted(_usable_flags())
    except NativeUnavailable as error:
        pytest.skip(str(error))
    sources = (Path(__file__).with_name("team_driver.cpp"), Path("cluster/engine/team.h").resolve())
    flags = ("-std=c++17", "-O2", "-march=native", "-pthread", "-fPIC", "-shared", f"-I{sources[1].parent}")
    library = ctypes.CDLL(str(build_library(sources, flags, machine)))
    library.run_calls.restype = ctypes.c_double
    return library


def run(driver, threads: int, late: int = -1, sleep_ms: int = 0, *, repeatable: bool) -> tuple[np.ndarray, float]:
    values = np.zeros((OPERATIONS + 1, COUNT), np.int32)
    address = values.ctypes.data_as(ctypes.c_void_p)
    return values, driver.run_calls(address, threads, OPERATIONS, late, sleep_ms, int(repeatable))


def run_until_late(driver, *, repeatable: bool) -> tuple[np.ndarray, float]:
    """With a worker that fell asleep; a busy machine may keep it from taking part at all."""
    for _ in range(200):
        values, through_ms = run(driver, 2, LATE, SLEEP_MS, repeatable=repeatable)
        if through_ms >= 0:
            return values, through_ms
    pytest.skip("no worker got a part in 200 calls")


@pytest.mark.parametrize("repeatable", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_operations_follow_one_another(driver, threads, repeatable):
    for _ in range(300):
        values, _ = run(driver, threads, repeatable=repeatable)
        assert (values == np.arange(OPERATIONS + 1)[:, None]).all()


def test_what_a_late_thread_holds_is_computed_again(driver):
    values, through_ms = run_until_late(driver, repeatable=True)
    assert through_ms < SLEEP_MS
    assert (values == np.arange(OPERATIONS + 1)[:, None]).all()


def test_what_cannot_be_repeated_is_waited_for(driver):
    values, through_ms = run_until_late(driver, repeatable=False)
    assert through_ms >= SLEEP_MS
    assert (values == np.arange(OPERATIONS + 1)[:, None]).all()


def test_a_call_beside_another_runs_alone(driver):
    assert driver.run_at_once(2, 300)

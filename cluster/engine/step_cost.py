"""What a step costs on this machine, by rows, length of context and sessions: the governor's cost curve.

Measured once and kept on disk by what it depends on; a kept curve is believed where two quick looks agree with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from cluster.core.disk_cache import cache_folder
from cluster.engine.cpu import cpu_name
from cluster.engine.kv_cache import SlotRows
from cluster.engine.rank import Rank

log = logging.getLogger(__name__)

SOURCES = (".py", ".h", ".cpp")
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXT = 64  # committed positions behind which rows are measured first ...
FAR_CONTEXT = 1024  # ... and once more, to know what context costs
QUIET_LOOKS = 4  # at all widths that show nothing clearly faster end the measurement ...
SETTLED = (
    0.97  # ... faster, that is, by this factor; an engine starts while much else does, and the curve outlives that
)
PATIENCE_S = 8.0  # for each context
STALE_FACTOR = 1.5  # how far a kept curve may be from what a look shows


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Seconds of a step by number of rows; ``rows`` ascending.

    seconds: of one session's rows behind ``context`` committed positions. slopes: seconds that each further position
    adds, by rows; empty where context costs nothing. session_slope: what a position adds for every further session,
    however many of the rows are its own, since its K/V has to be read once more.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    slopes: tuple[float, ...] = ()
    context: int = 0
    session_slope: float = 0.0

    def at(self, rows: int, context: float | None = None, sessions: int = 1) -> float:
        """Seconds of a step of ``rows`` rows of so many sessions, each behind ``context`` committed positions."""
        seconds = float(np.interp(rows, self.rows, self.seconds))
        if self.slopes and context is not None:
            seconds += (context - self.context) * float(np.interp(rows, self.rows, self.slopes))
        return seconds + self.other_sessions(context, sessions)

    def other_sessions(self, context: float | None, sessions: int) -> float:
        """Seconds in which the K/V of all sessions but one is read."""
        return max(0, sessions - 1) * (context or 0.0) * self.session_slope

    def slower(self, step_s: float, row_s: float) -> CostCurve:
        """This curve with so many seconds added to each step, and for each of its rows."""
        return replace(self, seconds=tuple(s + step_s + row_s * rows for rows, s in zip(self.rows, self.seconds)))


def measure_steps(rank: Rank, max_rows: int) -> CostCurve:
    """Least seconds of a step at each width up to ``max_rows``, behind two lengths of context.

    Uses one free KV slot and gives it back. The widths are measured in turn: what else the machine did for a moment
    must not become the price of one width for as long as the engine lives.
    """
    widths = (*(width for width in WIDTHS if width < max_rows), max_rows)
    near, far = contexts(rank.kv.capacity)
    seconds = tuple(accumulate(_least_seconds(rank, widths, near), max))
    further = _least_seconds(rank, widths, far)
    # Where the machine was busier meanwhile a slope comes out too steep: without context a step still costs something.
    steep = (min(max(0.0, b - a) / (far - near), a / (2 * near)) for a, b in zip(seconds, further))
    slopes = tuple(accumulate(steep, max))
    return CostCurve(widths, seconds, slopes, near, _without_rows(widths, slopes))


def _without_rows(widths: Sequence[int], slopes: Sequence[float]) -> float:
    """What a position would cost a session without rows: reading it, and no arithmetic. By narrow steps: where few rows
    wait for memory, arithmetic shows only in wide ones."""
    narrow = max(2, (len(widths) + 1) // 2)
    intercept = float(np.polyfit(widths[:narrow], slopes[:narrow], 1)[1]) if len(widths) > 1 else slopes[0]
    return min(max(0.0, intercept), slopes[0])


def contexts(capacity: int) -> tuple[int, int]:
    """The two lengths of context that a curve is measured behind."""
    return min(CONTEXT, capacity // 2), min(FAR_CONTEXT, capacity)


def kept_curve(rank: Rank, max_rows: int, path: Path, report: Callable[[str], None] = log.info) -> CostCurve:
    """The curve in ``path`` where it still holds; else a new one, which is left there if the folder can be written."""
    curve = load_curve(path)
    if curve is not None and curve.rows[-1] == max_rows and still_holds(rank, curve):
        return curve
    report(f"measuring the cost curve of steps up to {max_rows} rows")
    curve = measure_steps(rank, max_rows)
    fresh = path.with_suffix(f".{time.monotonic_ns()}")
    try:
        fresh.write_text(json.dumps(asdict(curve)))
        fresh.replace(path)
    except OSError as error:  # a cache that is read-only, or full: the next start measures again
        log.warning("the cost curve cannot be kept: %s", error)
    return curve


def load_curve(path: Path) -> CostCurve | None:
    """None where there is no curve, or something else."""
    try:
        data = json.loads(path.read_text())
        rows, seconds, slopes = (tuple(data[name]) for name in ("rows", "seconds", "slopes"))
        return CostCurve(rows, seconds, slopes, data["context"], data["session_slope"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def still_holds(rank: Rank, curve: CostCurve) -> bool:
    """Whether the narrowest step and one in the middle take about as long as ``curve`` says."""
    looks = (curve.rows[0], curve.rows[len(curve.rows) // 2])
    for width, seconds in zip(looks, _least_seconds(rank, looks, curve.context)):
        if not 1 / STALE_FACTOR < seconds / curve.at(width) < STALE_FACTOR:
            return False
    return True


def curve_path(folder: Path, dtype: str, kernels: str, threads: int, capacity: int) -> Path:
    """Where the curve of this model is kept, by all it depends on: weights, dtype, kernels, code, threads, the contexts
    that a slot of ``capacity`` allows, hardware."""
    parts: list[object] = [folder.resolve(), dtype, kernels, threads or torch.get_num_threads(), cpu_name()]
    parts += contexts(capacity)
    parts += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    parts += [torch.__version__, (folder / "config.json").read_text()]
    parts += [source.read_text() for source in sorted(Path(__file__).parent.iterdir()) if source.suffix in SOURCES]
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()
    return cache_folder("cost") / f"{digest[:24]}.json"


def _least_seconds(rank: Rank, widths: Sequence[int], context: int) -> list[float]:
    slot = rank.kv.allocate()
    try:
        rank.kv.fill(slot, context)
        least = dict.fromkeys(widths, math.inf)
        enough, quiet = time.perf_counter() + PATIENCE_S, 0
        while quiet < QUIET_LOOKS and time.perf_counter() < enough:
            quiet += 1
            for width in widths:
                rows = _chain(slot, min(width, rank.kv.scratch))
                start = time.perf_counter()
                rank.forward([rows])
                seconds = time.perf_counter() - start
                if seconds < SETTLED * least[width]:
                    quiet = 0
                least[width] = min(least[width], seconds)
        return list(least.values())
    finally:
        rank.kv.free(slot)


def _chain(slot: int, count: int) -> SlotRows:
    return SlotRows(slot, np.zeros(count, np.int32), np.arange(-1, count - 1, dtype=np.int32))

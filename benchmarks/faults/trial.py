"""One trial: steady load, one fault in the middle of it, and what became of every request."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.faults.catalogue import Fault
from benchmarks.faults.head import wait_until
from benchmarks.faults.load import Answer, Load
from benchmarks.faults.service import Rig

IDLE_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Result:
    """``longest_pause_s``: of any stream from the fault on. ``replays``: calls that clients repeated. ``recovery_s`` is
    None where the service did not recover; ``leaked``: something was still held when the last stream had ended."""

    fault: str
    requests: int
    lost: int
    differing: int
    replays: int
    longest_pause_s: float
    recovery_s: float | None
    leaked: bool
    notes: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """No request lost, none different, nothing leaked, all well again."""
        return not self.lost and not self.differing and not self.leaked and self.recovery_s is not None

    def within(self, fault: Fault) -> bool:
        """Sound, and as quick as promised."""
        return (
            self.recovery_s is not None
            and self.sound
            and self.longest_pause_s <= fault.pause_s
            and self.recovery_s <= fault.recovery_s
        )


def say(text: str) -> None:
    """Progress, on stderr with the time of day: stdout is for results."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(fault: Fault, rig: Rig, requests: int, expected: Mapping[int, Answer], report: Callable[[str], None]) -> Result:
    """At least ``requests`` requests, a third of them before the fault; load goes on until all is well again."""
    notes: list[str] = []
    load = Load(rig.address, expected, report)
    load.start()
    recovery_s: float | None = None
    try:
        load.wait_for(requests // 3)
        struck = time.monotonic()
        report(f"{fault.what}, after {len(load.answers)} requests")
        try:
            recovery_s = fault.strike(rig)
            report(f"recovered after {recovery_s:.1f} s, {len(load.answers)} requests")
        except (TimeoutError, LookupError) as error:
            notes.append(str(error))
        load.wait_for(requests)
    finally:
        load.stop()
    leaked = False
    try:
        rig.wait_until_whole()
        wait_until(rig.idle, IDLE_LIMIT_S, "every slot and lease is given back")
    except TimeoutError as error:
        leaked = True
        notes.append(str(error))
    notes += [f"request {answer.number}: {answer.error}" for answer in load.lost[:5]]
    notes += [f"request {answer.number} differs" for answer in load.differing[:5]]
    return Result(
        fault.name,
        len(load.answers),
        len(load.lost),
        len(load.differing),
        sum(answer.replays for answer in load.answers),
        round(max(answer.longest_pause_s(struck) for answer in load.answers), 2),
        None if recovery_s is None else round(recovery_s, 2),
        leaked,
        tuple(notes),
    )

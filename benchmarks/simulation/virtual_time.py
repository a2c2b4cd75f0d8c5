"""Virtual time: events in order, and threads of which one runs at a time, so that blocking code can be simulated as is.

A ``Process`` is a thread that owns the baton until it sleeps; the event loop owns it otherwise. Everything therefore
happens in one order, which follows from the events' times and from the order in which they were made.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from types import TracebackType


class EventLoop:
    """Events by time; those of one time in the order in which they were made."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def clock(self) -> float:
        return self.now

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Run ``action`` at ``time_s``, or now where that is over."""
        heapq.heappush(self._events, (max(time_s, self.now), next(self._numbers), action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay_s, action)

    def run(self, until: Callable[[], bool]) -> None:
        """Run events until ``until`` holds or none is left."""
        while self._events and not until():
            self.now, _, action = heapq.heappop(self._events)
            action()


class Stopped(BaseException):
    """Raised inside a process that is to end, wherever it sleeps."""


class Process:
    """A thread in virtual time. ``sleep`` and ``wait`` may be called by its own code only."""

    def __init__(self, loop: EventLoop, run: Callable[[], None], name: str) -> None:
        self.failure: BaseException | None = None
        self._loop = loop
        self._run = run
        self._mine, self._loops = threading.Semaphore(0), threading.Semaphore(0)
        self._naps = 0  # a wake-up that was meant for an earlier nap is void
        self._woken = False
        self._ending = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()
        loop.at(loop.now, self._hand_over)

    def sleep(self, seconds: float) -> None:
        if seconds > 0.0:
            self.wait(seconds)

    def wait(self, seconds: float | None = None) -> bool:
        """Until ``wake`` or, where given, for ``seconds``. False where nobody woke it."""
        self._naps += 1
        nap, self._woken = self._naps, False
        if seconds is not None:
            self._loop.after(seconds, lambda: self._end_nap(nap))
        self._loops.release()
        self._mine.acquire()
        if self._ending:
            raise Stopped
        return self._woken

    def wake(self) -> None:
        """End the process's present nap, if it waits, at this moment of virtual time."""
        nap = self._naps
        self._woken = True
        self._loop.after(0.0, lambda: self._end_nap(nap))

    def stop(self) -> None:
        """End the thread; to be called where the loop has the baton."""
        if self._thread.is_alive():
            self._ending = True
            self._mine.release()
            self._thread.join()

    def _end_nap(self, nap: int) -> None:
        if nap == self._naps:
            self._hand_over()

    def _hand_over(self) -> None:
        self._naps += 1
        self._mine.release()
        self._loops.acquire()
        if self.failure is not None:
            raise self.failure

    def _main(self) -> None:
        self._mine.acquire()
        try:
            if not self._ending:
                self._run()
        except Stopped:
            return
        except BaseException as error:
            self.failure = error
        self._loops.release()


class Arrivals:
    """Stands for the ``threading.Condition`` of a pipeline whose engine thread is a ``Process``."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._waiting = False

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def wait(self, seconds: float) -> bool:
        self._waiting = True
        try:
            return self._process.wait(seconds)
        finally:
            self._waiting = False

    def notify_all(self) -> None:
        if self._waiting:
            self._process.wake()

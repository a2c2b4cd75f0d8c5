"""Fewer, larger stream items: what a request gains within a short interval leaves as one.

An item costs every process it passes on its way to the client, and on a small machine these processes share their cores
with the engine. The first item, the last one and any that comes late enough leave at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.core.types import StreamItem


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a stream gets an item: at most once in ``least_s``, and at most ``items_per_s`` over all streams."""

    least_s: float = 0.0
    items_per_s: float = 0.0

    def interval_s(self, streams: int) -> float:
        """Of each of ``streams`` streams; 0: an item per step."""
        return max(self.least_s, streams / self.items_per_s if self.items_per_s else 0.0)


def join(first: StreamItem, then: StreamItem) -> StreamItem:
    """Two consecutive items of one request as one."""
    return replace(
        then,
        token_ids=first.token_ids + then.token_ids,
        origins=first.origins + then.origins,
        position=first.position,
        text=first.text + then.text,
        seed=first.seed,
    )


class Pacer:
    """One request's items on their way out."""

    def __init__(self) -> None:
        self._held: StreamItem | None = None
        self._last_sent = float("-inf")

    def add(self, item: StreamItem) -> None:
        self._held = item if self._held is None else join(self._held, item)

    def take(self, now: float, interval_s: float) -> StreamItem | None:
        """What is to be sent now: all that is held, unless the last time was less than ``interval_s`` ago."""
        if self._held is None or now - self._last_sent < interval_s:
            return None
        item, self._held, self._last_sent = self._held, None, now
        return item

"""What the target and the draft workers say to each other: one call per worker and round, for all its sessions.

Commits are contiguous and idempotent: an ask carries every token since the length the worker last acknowledged, so a
lost call costs nothing and a repeated one is trimmed. Where a worker holds less than that, it asks for a resync.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import Any

from cluster.core.token_tree import TokenTree
from cluster.core.types import Commit, SamplingParams

PROTOCOL_VERSION = 4


@dataclass(frozen=True, slots=True)
class SessionStart:
    """Everything a worker needs to begin a session it does not hold; sent with the first ask and on resync."""

    token_ids: tuple[int, ...]
    prompt_len: int
    params: SamplingParams
    owner: str = ""


@dataclass(frozen=True, slots=True)
class DraftAsk:
    """One session's part of a call: what was committed since, and how large a tree is wanted.

    ``max_nodes`` 0 brings the worker up to date without a tree. ``start`` replaces whatever the worker holds.
    ``outcomes``: see ``drafters.base.Ask``.
    """

    commit: Commit
    max_nodes: int
    max_depth: int
    start: SessionStart | None = None
    outcomes: bool = False


@dataclass(frozen=True, slots=True)
class StageReport:
    """What one stage did in a call: ``held`` is the length it now holds of each session, ``resync`` whom it lost."""

    stage: str
    pid: int
    held: dict[str, int]
    resync: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class DraftReply:
    """Trees by session, keyed by the state they hang on. ``reports``: upstream stages first, this one last.

    A reply travels to the next stage as an object ref and to the target as the chain's answer.
    """

    trees: dict[str, TokenTree] = field(default_factory=dict)
    reports: tuple[StageReport, ...] = ()


def pack(message: list[DraftAsk] | DraftReply) -> bytes:
    """As it travels: Ray passes bytes on as they are, and takes several times as long to pickle the objects itself."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def unpack(data: bytes) -> Any:
    """What ``pack`` was given."""
    return pickle.loads(data)


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a draft worker says of itself when a lease is opened."""

    stage: str
    pid: int
    protocol: int
    tokenizer_hash: str


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A draft worker's work since it started: seconds of computing, asks, and asks that a newer one had overtaken."""

    busy_s: float
    asks: int
    overtaken: int

    def plus(self, busy_s: float, asks: int, overtaken: int) -> WorkerLoad:
        return WorkerLoad(self.busy_s + busy_s, self.asks + asks, self.overtaken + overtaken)


@dataclass(frozen=True, slots=True)
class Lease:
    """First item of ``Draft.open``: the worker to call, and its facts."""

    worker: Any  # ray.actor.ActorHandle
    facts: WorkerFacts

"""Who runs next, in which KV slot, and who has to make room: pure choices and the records they need.

Slots are static, so sessions are admitted by free slots. What a freed slot computed stays there as a prefix cache entry
until the slot is taken again: rows are row-invariant, so K/V reused is bit-equal to K/V computed anew.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.rounds.session import Session

MIN_COPY = 16  # positions that copying must win over what the slot holds: fewer are computed in a step anyway
KEEP_SHARE = 0.5  # a cached prefix is taken over where it shares so much of its tokens, and copied where less
MIN_PROGRESS = 8  # tokens a session that was preempted must emit before it may be preempted again

TokenIds = npt.NDArray[np.int32]


class WaitingQueue:
    """Sessions in the order in which they will run: by priority, replays first, then by arrival.

    A preempted session keeps its arrival, so it stands before all that came after it.
    """

    def __init__(self) -> None:
        self._sessions: list[Session] = []

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions)

    def __contains__(self, session: Session) -> bool:
        return session in self._sessions

    @property
    def head(self) -> Session:
        return self._sessions[0]

    @property
    def num_new(self) -> int:
        """Sessions that never ran and are no replays: those a full queue refuses."""
        return sum(session.num_admitted == 0 and not session.request.admitted for session in self._sessions)

    def add(self, session: Session) -> None:
        bisect.insort(self._sessions, session, key=rank)

    def pop(self) -> Session:
        return self._sessions.pop(0)

    def remove(self, session: Session) -> None:
        self._sessions.remove(session)


def rank(session: Session) -> tuple[int, bool, int]:
    """Lower runs first."""
    return session.request.priority, not session.request.admitted, session.number


def choose_victim(head: Session, running: Sequence[Session], patient: bool) -> Session | None:
    """The running session whose slot ``head``, the first that waits, should get; None where it has to wait.

    The lowest priority goes first, then the youngest. Equal priority gives way only to a replay that has waited long
    (``patient`` is False), and replays never do. Nobody is preempted twice without progress in between.
    """

    def gives_way(session: Session) -> bool:
        if session.request.priority > head.request.priority:
            return True
        replayed = head.request.admitted and not session.request.admitted
        return replayed and not patient and session.request.priority == head.request.priority

    candidates = [session for session in running if gives_way(session) and has_progressed(session)]
    return max(candidates, key=rank, default=None)


def has_progressed(session: Session) -> bool:
    return session.num_admitted <= 1 or session.num_output - session.output_at_admission >= MIN_PROGRESS


@dataclass(frozen=True, slots=True)
class Placement:
    """A free slot to take, and the positions it begins with: its own first ``length``, or copied from ``source``."""

    slot: int
    length: int = 0
    source: int | None = None


@dataclass(frozen=True, slots=True)
class _Entry:
    tokens: TokenIds
    salt: str
    tenant: int
    last_use: int


class PrefixCache:
    """What freed slots still hold: the tokens of their positions, by slot and by the tenant who left them."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._uses = 0

    def keep(self, slot: int, tenant: int, token_ids: Sequence[int], salt: str) -> None:
        """The slot was freed with the K/V of exactly these tokens."""
        self._uses += 1
        self._entries[slot] = _Entry(np.asarray(token_ids, np.int32), salt, tenant, self._uses)

    def place(
        self,
        token_ids: Sequence[int],
        salt: str,
        free: Mapping[int, int],
        running: Iterable[tuple[int, Sequence[int], int]] = (),
    ) -> Placement:
        """Where to put a session whose first ``token_ids`` need K/V.

        free: slots, each with its last tenant; not empty. running: (slot, tokens, how many of them have K/V) of equal
        salt.
        The longest common prefix is taken over with its slot, unless most of the slot's tokens are others: these may
        be asked for again, so the prefix is copied to the slot least recently used.
        """
        wanted = np.asarray(token_ids, np.int32)
        entries = {slot: entry for slot, entry in self._entries.items() if free.get(slot) == entry.tenant}
        oldest = min(free, key=lambda slot: entries[slot].last_use if slot in entries else 0)
        shared = {slot: common_prefix(wanted, e.tokens) for slot, e in entries.items() if e.salt == salt}
        best = max(shared, key=lambda slot: (shared[slot], entries[slot].last_use), default=oldest)
        if best == oldest or shared[best] >= KEEP_SHARE * len(entries[best].tokens):
            home = Placement(best, shared.get(best, 0))
        else:
            home = Placement(oldest, shared.get(oldest, 0))
        beginning = token_ids[:MIN_COPY]
        for slot, tokens, held in running:
            if held >= MIN_COPY and tokens[:MIN_COPY] == beginning:  # of the others nobody needs to see the whole text
                shared[slot] = common_prefix(wanted, np.asarray(tokens[: min(held, len(wanted))], np.int32))
        source = max(shared, key=lambda slot: shared[slot], default=home.slot)
        if source != oldest and shared.get(source, 0) >= home.length + MIN_COPY:
            return Placement(oldest, shared[source], source)
        return home


def common_prefix(left: TokenIds, right: TokenIds) -> int:
    """How many leading tokens are equal."""
    size = min(len(left), len(right))
    differ = np.flatnonzero(left[:size] != right[:size])
    return int(differ[0]) if len(differ) else size

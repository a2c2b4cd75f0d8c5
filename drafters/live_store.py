"""``LiveStores``: what sessions wrote lately, kept apart by owner, and made a datastore again in the background.

A store shared between owners leaks: whoever measures how fast an answer comes learns whether somebody else was
answered the same before. So an owner's sessions are guessed for from that owner's outputs alone. Who an owner is, the
doors say (``deployments.codec.owner_of``). Nothing is written to disk; what an owner's store holds is gone with the
process.
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from drafters.datastore import Datastore

log = logging.getLogger(__name__)

GROWTH = 0.25  # an index is made anew when this share of its text is new


@dataclass(slots=True)
class _Owned:
    documents: deque[array[int]] = field(default_factory=deque)
    num_tokens: int = 0
    num_new: int = 0
    store: Datastore | None = None


class LiveStores:
    """Per owner the newest ``max_tokens`` of output; owners beyond ``max_owners`` are forgotten, longest unused first.

    ``min_new`` tokens must have come before an index is made anew. Any thread may call.
    """

    def __init__(
        self, vocab_size: int, *, max_tokens: int = 1 << 18, max_owners: int = 64, min_new: int = 4096
    ) -> None:
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._max_owners = max_owners
        self._min_new = min_new
        self._owned: OrderedDict[str, _Owned] = OrderedDict()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def of(self, owner: str) -> Datastore | None:
        """The owner's store as of its last index."""
        with self._lock:
            owned = self._owned.get(owner)
            if owned is None:
                return None
            self._owned.move_to_end(owner)
            return owned.store

    def add(self, owner: str, token_ids: Sequence[int]) -> None:
        """Keep one finished output. It can be found once the next index is made."""
        with self._lock:
            owned = self._owned.setdefault(owner, _Owned())
            self._owned.move_to_end(owner)
            owned.documents.append(array("i", token_ids))
            owned.num_tokens += len(token_ids)
            owned.num_new += len(token_ids)
            while owned.num_tokens > self._max_tokens and len(owned.documents) > 1:
                owned.num_tokens -= len(owned.documents.popleft())
            while len(self._owned) > self._max_owners:
                self._owned.popitem(last=False)
            if self._thread is None and self._due() is not None:
                self._thread = threading.Thread(target=self._work, name="live-store", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Until every index that is due has been made."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _due(self) -> str | None:
        for owner, owned in self._owned.items():
            if owned.num_new >= max(self._min_new, GROWTH * owned.num_tokens):
                return owner
        return None

    def _work(self) -> None:
        while True:
            with self._lock:
                owner = self._due()
                if owner is None:
                    self._thread = None
                    return
                owned = self._owned[owner]
                documents, owned.num_new = list(owned.documents), 0
            try:
                store = Datastore.of(documents, self._vocab_size)
            except Exception:  # the thread must live: other owners wait for theirs
                log.exception("live store: an owner's index could not be made")
                continue
            with self._lock:
                owned.store = store

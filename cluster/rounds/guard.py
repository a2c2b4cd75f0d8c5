"""A drafter behind a guard: whatever it raises or returns costs its session guesses, and nobody a round.

All hosts of drafters use it: the scheduler and ``LocalDrafter`` in the engine's thread, ``DraftWorker`` elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from cluster.core.errors import EngineDied, Overloaded
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin, SamplingParams
from drafters.base import Ask, Drafter

log = logging.getLogger(__name__)

ANY_TOKEN = 2**31 - 1


class GuardedDrafter:
    """Raises next to nothing that a drafter raises. A session for which a call failed is dropped; ``holds`` tells."""

    def __init__(self, drafter: Drafter, vocab_size: int | None = None) -> None:
        self.stage: Origin = drafter.stage
        self.vocab_size = vocab_size or drafter.vocab_size or ANY_TOKEN
        self._drafter = drafter
        self._held: set[str] = set()

    def holds(self, session_id: str) -> bool:
        return session_id in self._held

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> bool:
        """False where the drafter does not take the session."""
        try:
            self._drafter.begin(session_id, token_ids, params, prompt_len, owner)
        except Overloaded as error:
            log.info("the drafter does not take session %s: %s", session_id, error)
            self.end(session_id)
        except Exception:
            self._drop(session_id)
        else:
            self._held.add(session_id)
        return self.holds(session_id)

    def commit(self, session_id: str, token_ids: Sequence[int]) -> bool:
        """False where the session is not held (any more)."""
        if self.holds(session_id):
            try:
                self._drafter.commit(session_id, token_ids)
            except Exception:
                self._drop(session_id)
        return self.holds(session_id)

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        """Trees that keep a tree's invariants, of those sessions that are held and asked about.

        Where a call for several sessions fails, each is tried alone: one bad session does not cost the others. Raises
        ``EngineDied`` alone: that is no session's fault, and no call will succeed again.
        """
        asks = [ask for ask in asks if self.holds(ask.session_id)]
        if not asks:
            return {}
        try:
            found = self._drafter.propose(asks, upstream)
            return {ask.session_id: found[ask.session_id] for ask in asks if self._sound(ask.session_id, found)}
        except EngineDied:
            raise
        except Exception:
            if len(asks) == 1:
                self._drop(asks[0].session_id)
                return {}
        log.warning("a call for %d sessions failed in the drafter; each is tried alone", len(asks))
        trees: dict[str, TokenTree] = {}
        for ask in asks:
            trees |= self.propose([ask], upstream)
        return trees

    def end(self, session_id: str) -> None:
        self._held.discard(session_id)
        try:
            self._drafter.end(session_id)
        except Exception:
            log.exception("the drafter failed to end session %s", session_id)

    def _sound(self, session_id: str, trees: Mapping[str, TokenTree]) -> bool:
        tree = trees.get(session_id)
        if tree is None:
            return False
        try:
            tree.check(self.vocab_size)
        except Exception as error:  # InvalidTree, or what checking something that is no tree gives
            log.warning("the drafter's tree for %s is refused: %s", session_id, error)
            return False
        return True

    def _drop(self, session_id: str) -> None:
        """To be called while the drafter's exception is being handled."""
        log.exception("the drafter fails for session %s: it gets no more guesses from it", session_id)
        self.end(session_id)

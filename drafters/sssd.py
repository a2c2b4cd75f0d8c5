"""SSSD: guesses by looking up what followed the newest tokens earlier (arXiv 2411.05894).

Two places to look: the session's own prompt and output, which repeat themselves, and a datastore of what the target
writes (``datastore.py``), whose phrases come again in every answer. Cost: no model, tens of microseconds per session
and round, so it is the stage that is always there. How a tree is made of what was found: ``ngram_tree.py``.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.core.errors import Overloaded, UnknownSession
from cluster.core.native_build import NativeUnavailable
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin, SamplingParams
from drafters.base import Ask
from drafters.datastore import Datastore
from drafters.live_store import LiveStores
from drafters.ngram_tree import PlainIndex, Rules, SessionIndex
from drafters.options import SssdOptions
from drafters.sssd_native import NativeIndex, library

log = logging.getLogger(__name__)

PROMPT_TAIL = 3  # prompt tokens kept before an output in a live store, so that its beginning can be found


@dataclass(slots=True)
class _Session:
    """``tokens``: the text that is indexed, at least its newest ``max_tokens``; the last ``written`` are output."""

    owner: str
    tokens: array[int]
    written: int
    index: SessionIndex


class SssdDrafter:
    """One index per session, and the stores all of them share. Raises ``Overloaded`` beyond ``max_sessions``.

    ``live`` collects what ended sessions wrote, for later ones of the same owner.
    """

    vocab_size: int | None = None

    def __init__(
        self,
        options: SssdOptions,
        *,
        max_sessions: int = 16,
        stage: Origin = Origin.SMALL,
        store: Datastore | None = None,
        live: LiveStores | None = None,
        rules: Rules | None = None,
    ) -> None:
        self.stage = stage
        self._store = store
        self._live = live
        self._max_tokens = options.max_tokens
        self._max_sessions = max_sessions
        self._rules = rules or Rules(query=options.query, chain=options.chain)
        self._new_index = _index_kind()
        self._sessions: dict[str, _Session] = {}

    def use(self, store: Datastore) -> None:
        """Look in ``store`` from the next round on. Any thread may call."""
        self._store = store

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        if session_id not in self._sessions and len(self._sessions) >= self._max_sessions:
            raise Overloaded(f"{self._max_sessions} sessions are held already")
        self._sessions[session_id] = self._indexed(owner, token_ids, len(token_ids) - prompt_len)

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        sessions = [self._session(ask.session_id) for ask in asks]
        trees = {
            ask.session_id: session.index.grow(
                self._stores(session.owner), ask.max_nodes, ask.max_depth, int(self.stage), ask.outcomes, ask.min_score
            )
            for ask, session in zip(asks, sessions)
        }
        return {session_id: tree for session_id, tree in trees.items() if len(tree)}

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        session = self._session(session_id)
        session.tokens.extend(token_ids)
        session.written += len(token_ids)
        session.index.extend(token_ids)
        if len(session.tokens) > 2 * self._max_tokens:
            self._sessions[session_id] = self._indexed(session.owner, session.tokens, session.written)

    def end(self, session_id: str) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None and session.written and session.owner and self._live is not None:
            self._live.add(session.owner, session.tokens[-session.written - PROMPT_TAIL :])

    def _stores(self, owner: str) -> list[Datastore]:
        live = self._live.of(owner) if self._live is not None and owner else None
        return [store for store in (self._store, live) if store is not None]

    def _indexed(self, owner: str, token_ids: Sequence[int], written: int) -> _Session:
        tokens = array("i", token_ids[-self._max_tokens :])
        index = self._new_index(self._rules)
        index.extend(tokens)
        return _Session(owner, tokens, written, index)

    def _session(self, session_id: str) -> _Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSession(f"session {session_id!r} was not begun")
        return session


def _index_kind() -> Callable[[Rules], SessionIndex]:
    try:
        library()
    except NativeUnavailable as error:
        log.warning("sssd: look-up in Python, many times slower: %s", error)
        return PlainIndex
    return NativeIndex

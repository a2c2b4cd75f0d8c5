"""Following sessions, for drafters that work on the target's own rank and keep nothing else of a session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.core.errors import UnknownSession
from cluster.core.types import SamplingParams
from cluster.core.warp import History


@dataclass(slots=True)
class Followed:
    """One session: its committed tokens, and what decides how logits become tokens."""

    tokens: list[int]
    params: SamplingParams
    history: History


class Follower:
    """The part of ``drafters.base.Drafter`` that is bookkeeping: begin, commit, end."""

    def __init__(self) -> None:
        self._sessions: dict[str, Followed] = {}

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        history = History(token_ids[:prompt_len], token_ids[prompt_len:], params)
        self._sessions[session_id] = Followed(list(token_ids), params, history)

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        session = self._session(session_id)
        session.tokens.extend(token_ids)
        session.history.extend(token_ids)

    def end(self, session_id: str) -> None:
        self._sessions.pop(session_id, None)

    def _session(self, session_id: str) -> Followed:
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSession(f"session {session_id!r} was not begun")
        return session

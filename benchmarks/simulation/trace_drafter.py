"""A ``Drafter`` that offers what a recorded one offered, in simulated time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.simulation.traces import SessionTrace, Trace
from cluster.core.errors import UnknownSession
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin, SamplingParams
from drafters.base import Ask


@dataclass(slots=True)
class _Held:
    trace: SessionTrace
    position: int


class TraceDrafter:
    """A session follows the trace's session that its seed names. ``spend`` is told how many trees each call makes."""

    vocab_size: int | None = None

    def __init__(self, trace: Trace, stage: Origin, spend: Callable[[int], None] = lambda trees: None) -> None:
        self.stage = stage
        self._trace = trace
        self._spend = spend
        self._held: dict[str, _Held] = {}

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        sessions = self._trace.sessions
        self._held[session_id] = _Held(sessions[params.seed % len(sessions)], len(token_ids) - prompt_len)

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        self._spend(len(asks))
        return {ask.session_id: self._tree(ask) for ask in asks}

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        self._of(session_id).position += len(token_ids)

    def end(self, session_id: str) -> None:
        self._held.pop(session_id, None)

    def _tree(self, ask: Ask) -> TokenTree:
        held = self._of(ask.session_id)
        return held.trace.offer(held.position).tree(held.position, ask.max_nodes, ask.max_depth)

    def _of(self, session_id: str) -> _Held:
        if session_id not in self._held:
            raise UnknownSession(session_id)
        return self._held[session_id]

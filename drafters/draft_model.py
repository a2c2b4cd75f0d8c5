"""A model as drafter: any decoder of the target's vocabulary grows a tree best-first (``growth.py``).

Cost: one forward of the draft model per pass, for all asked sessions together. Its K/V follows the target's commits:
what a propose computed for tokens that were then accepted is kept, the rest is dropped. A prompt is read in chunks, one
per propose, so that a long one does not hold up the other sessions; until it is read, its session gets no tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cluster.core.errors import InvalidTree, Overloaded, UnknownSession
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin, SamplingParams
from cluster.core.warp import History
from cluster.engine.kv_cache import KVCache, SlotRows
from cluster.engine.rank import Rank
from drafters.base import Ask
from drafters.growth import Growth, Plot, grow
from drafters.options import GrowthOptions

_NO_SKIP: frozenset[int] = frozenset()


class Slots(Protocol):
    """Who owns the K/V slots a drafter computes in."""

    max_lead: int
    """Committed tokens a propose may compute on its way to a tree."""

    prefills: bool
    """Whether the drafter computes committed tokens beyond ``max_lead`` itself."""

    def begin(self, session_id: str, token_ids: Sequence[int], held: Sequence[int]) -> None:
        """Get a slot; ``held`` are the committed tokens of the session it replaces, if any."""
        ...

    def slot(self, session_id: str) -> int | None:
        """The session's slot; None where it has none at the moment."""
        ...

    def keep(self, session_id: str, rows: Sequence[int]) -> None:
        """Commit these scratch rows, in order, and drop the others."""
        ...

    def end(self, session_id: str) -> None: ...


class OwnSlots:
    """Slots of a rank that belongs to the drafter. Raises ``Overloaded`` where none is free."""

    prefills = True

    def __init__(self, kv: KVCache, max_lead: int) -> None:
        self.max_lead = max_lead
        self._kv = kv
        self._slots: dict[str, int] = {}

    def begin(self, session_id: str, token_ids: Sequence[int], held: Sequence[int]) -> None:
        slot = self._slots.get(session_id)
        if slot is None:
            if self._kv.num_free == 0:
                raise Overloaded(f"all {len(self._slots)} draft slots are taken")
            self._slots[session_id] = self._kv.allocate()
            return
        shared = _shared_prefix(token_ids, held)
        self._kv.truncate(slot, max(0, min(shared, self._kv.length(slot), len(token_ids) - 1)))

    def slot(self, session_id: str) -> int | None:
        return self._slots[session_id]

    def keep(self, session_id: str, rows: Sequence[int]) -> None:
        self._kv.commit(self._slots[session_id], rows)

    def end(self, session_id: str) -> None:
        slot = self._slots.pop(session_id, None)
        if slot is not None:
            self._kv.free(slot)


@dataclass(slots=True)
class _Session:
    tokens: list[int]
    params: SamplingParams
    history: History
    plot: Plot | None = field(default=None)
    """The last propose's work, while its scratch rows are still there."""


class ModelDrafter:
    """Drafts for many sessions with one rank.

    max_len: positions the model can take; longer sessions get no tree. skip: sub-layers left out for guesses;
    lead_skip: for committed tokens. K/V of guesses is kept for accepted tokens only where nothing was skipped.
    """

    def __init__(
        self,
        rank: Rank,
        slots: Slots,
        options: GrowthOptions,
        *,
        max_len: int,
        stage: Origin = Origin.MEDIUM,
        skip: frozenset[int] = _NO_SKIP,
        lead_skip: frozenset[int] = _NO_SKIP,
    ) -> None:
        self.stage = stage
        self.vocab_size: int | None = rank.config.vocab_size
        self._rank = rank
        self._slots = slots
        self._options = options
        self._max_len = max_len
        self._skip = skip
        self._lead_skip = lead_skip
        self._sessions: dict[str, _Session] = {}

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        """Raises ``Overloaded`` where no slot is free. The prompt is read by later calls of ``propose``."""
        held = self._sessions.get(session_id)
        if held is not None:
            self._rewind(session_id, held)
        self._slots.begin(session_id, token_ids, held.tokens if held else ())
        history = History(token_ids[:prompt_len], token_ids[prompt_len:], params)
        self._sessions[session_id] = _Session(list(token_ids), params, history)

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        sessions = [self._session(ask.session_id) for ask in asks]
        work: list[tuple[_Session, Plot]] = []
        behind: list[tuple[str, SlotRows]] = []
        for ask, session in zip(asks, sessions):
            slot = self._slots.slot(ask.session_id)
            if slot is None or not 0 < len(session.tokens) <= self._max_len:
                continue
            self._rewind(ask.session_id, session)
            lead = session.tokens[self._rank.kv.length(slot) :]
            if len(lead) <= self._slots.max_lead:
                work.append((session, self._plot(ask, session, slot, lead, upstream)))
            elif self._slots.prefills:
                behind.append((ask.session_id, _chunk(slot, lead[: self._slots.max_lead])))
        self._prefill(behind)
        if work:
            grow(self._rank, [plot for _, plot in work], self._options, self._lead_skip, self._skip)
        for session, plot in work:
            session.plot = plot
        trees = {plot.session_id: plot.growth.tree() for _, plot in work}
        return {session_id: tree for session_id, tree in trees.items() if len(tree)}

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        session = self._session(session_id)
        plot, session.plot = session.plot, None
        if plot is not None and token_ids:
            # The last token stays uncomputed: it is the next root, whose logits the next propose needs.
            followed = [] if self._skip else plot.growth.follow(token_ids[:-1])
            self._slots.keep(session_id, [*range(len(plot.lead)), *followed])
        session.tokens.extend(token_ids)
        session.history.extend(token_ids)

    def end(self, session_id: str) -> None:
        if self._sessions.pop(session_id, None) is not None:
            self._slots.end(session_id)

    def _session(self, session_id: str) -> _Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSession(f"session {session_id!r} was not begun")
        return session

    def _rewind(self, session_id: str, session: _Session) -> None:
        """Drop the guesses of a propose that no commit followed, keeping the committed tokens it computed."""
        if session.plot is not None:
            self._slots.keep(session_id, range(len(session.plot.lead) - 1))
            session.plot = None

    def _plot(self, ask: Ask, session: _Session, slot: int, lead: list[int], upstream: Mapping[str, TokenTree]) -> Plot:
        base = len(session.tokens)
        # A node at depth d is evaluated at position base + d - 1; the deepest level needs no evaluation.
        max_depth = min(ask.max_depth, self._max_len - base + 1)
        hints = usable(upstream.get(ask.session_id), self._rank.config.vocab_size)
        growth = Growth(ask.max_nodes, max_depth, hints, self._options, self.stage, ask.min_score)
        return Plot(ask.session_id, slot, lead, base, session.params, session.history, growth)

    def _prefill(self, behind: Sequence[tuple[str, SlotRows]]) -> None:
        """Compute one chunk of committed tokens for each session that lags behind, in the full model."""
        if not behind:
            return
        self._rank.forward([rows for _, rows in behind], skip=self._lead_skip)
        for session_id, rows in behind:
            self._slots.keep(session_id, range(len(rows.tokens)))


def usable(hints: TokenTree | None, vocab_size: int) -> TokenTree:
    """Upstream's tree, or an empty one where it is missing or breaks a tree's invariants."""
    if hints is None:
        return TokenTree.empty()
    try:
        hints.check(vocab_size)
    except InvalidTree:
        return TokenTree.empty()
    return hints


def _chunk(slot: int, tokens: Sequence[int]) -> SlotRows:
    return SlotRows(slot, np.asarray(tokens, np.int32), np.arange(-1, len(tokens) - 1, dtype=np.int32), logits=False)


def _shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))

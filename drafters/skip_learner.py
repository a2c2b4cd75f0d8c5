"""What a skip search learns from: windows of the texts a drafter follows, running sessions' and those just ended.

A text stays of use after its session's end, as long as nobody else has moved into its slot: that is what idle time is
spent on. Every stretch of text is looked at once. So a search costs nothing where nothing new is said.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.core.types import SamplingParams
from cluster.engine.rank import Rank
from drafters.matchness import Window, score
from drafters.skip_search import SkipSearch

log = logging.getLogger(__name__)

LEAST_ROWS = 16  # shorter windows tell too little for the weights a pass has to read
SAVE_EVERY = 50  # candidates scored between two savings of the search's state


@dataclass(slots=True)
class _Text:
    """A session's tokens (the drafter's own list, which grows), and how far they are ``computed`` and ``studied``.

    computed: positions whose K/V is in the slot; studied: those that were part of a window, or belong to the prompt;
    tenant: whose K/V that is: a session that asks for no guesses takes a slot without a word to any drafter.
    """

    slot: int
    tenant: int
    tokens: Sequence[int]
    params: SamplingParams
    studied: int
    computed: int = 0

    @property
    def fresh(self) -> int:
        return min(self.computed, len(self.tokens) - 1) - self.studied


class SkipLearner:
    """Brings a search, the texts to learn from and the target's rank together. ``rows``: of one step, at most."""

    def __init__(self, rank: Rank, search: SkipSearch, *, rows: int, keep_in: Path | None = None) -> None:
        """``keep_in``: where the search's state is kept."""
        self.search = search
        self._rank = rank
        self._rows = rows
        self._keep_in = keep_in
        self._saved = search.trials
        self._running: dict[str, _Text] = {}
        self._left: dict[int, _Text] = {}
        self._window: Window | None = None

    def begin(self, session_id: str, slot: int, tokens: Sequence[int], prompt_len: int, params: SamplingParams) -> None:
        self._forget(slot)
        if not params.has_penalties:  # what such a session says next takes its whole history to know
            tenant = self._rank.kv.tenant(slot)
            self._running[session_id] = _Text(slot, tenant, tokens, params, max(0, prompt_len - 1))

    def computed(self, session_id: str, length: int) -> None:
        """The K/V of the session's first ``length`` tokens is in its slot."""
        text = self._running.get(session_id)
        if text is not None:
            text.computed = length

    def end(self, session_id: str) -> None:
        text = self._running.pop(session_id, None)
        if text is not None:
            self._left[text.slot] = text

    def study(self) -> bool:
        """Score one set on one window: a forward pass of ``rows`` at most. False where there is nothing to learn."""
        skip = self._next()
        if skip is None or self._window is None:
            return False
        adopted = self.search.adopted
        self.search.tell(score(self._rank, [self._window], skip))
        if self.search.adopted > adopted:
            log.info("swift: skips %s from now on, the %d. set tried", sorted(skip), self.search.trials)
        if self.search.adopted > adopted or self.search.trials >= self._saved + SAVE_EVERY:
            self._save()
        return True

    def _next(self) -> frozenset[int] | None:
        """What to score on the window that is open, or on a new one; None where there is no more text."""
        for slot in {text.slot for text in self._left.values() if self._rank.kv.tenant(text.slot) != text.tenant}:
            self._forget(slot)
        skip = self.search.ask() if self._window is not None else None
        if skip is None:
            self._window = self._fresh_window()
            if self._window is not None:
                self.search.open()
                skip = self.search.ask()
        return skip

    def _fresh_window(self) -> Window | None:
        """Of the newest text that has enough to offer."""
        texts = [*self._left.values(), *self._running.values()]
        text = next((text for text in reversed(texts) if text.fresh >= LEAST_ROWS), None)
        if text is None:
            return None
        first, count = text.studied, min(text.fresh, self._rows)
        text.studied += count
        tokens = np.asarray(text.tokens[first : first + count + 1], np.int32)
        return Window(text.slot, first, tokens, text.params)

    def _forget(self, slot: int) -> None:
        """Somebody else's keys and values will be in the slot."""
        self._left.pop(slot, None)
        self._running = {name: text for name, text in self._running.items() if text.slot != slot}
        if self._window is not None and self._window.slot == slot:
            self._window = None

    def _save(self) -> None:
        self._saved = self.search.trials
        if self._keep_in is None:
            return
        part = self._keep_in.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_text(json.dumps(self.search.state()) + "\n")
            part.replace(self._keep_in)
        except OSError as error:
            log.warning("swift: the search cannot be kept in %s: %s", self._keep_in, error)

"""Rows of another engine's batch, known by their text alone: no request ids come with them, and no word of an end.

A wrong match costs a guess and never correctness, since that engine verifies whatever is proposed. So a text is known
by its length and its last tokens, which stay cheap to compare however long the text is.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.core.types import SamplingParams, TreeKey, digest_of

MARK_TOKENS = 64  # of a text's end tell it from others of its length
FORGET_AFTER_S = 2.0  # a row that was not seen for so long has ended, or waits preempted and is then begun anew
LINGER_S = 10.0  # where no step has come since: vLLM is in a long one, or has nothing to do
GREEDY = SamplingParams(temperature=0.0)

Mark = tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class Row:
    """One row after a step. ``token_ids``: (n,) int32, prompt and output; the last ``new`` of them came in this step,
    none where the prompt is still being read. ``max_drafts``: guesses it may be given."""

    token_ids: npt.NDArray[np.int32]
    new: int
    max_drafts: int


class RowText:
    """A row's text as drafters follow it; see ``Drafted``."""

    def __init__(self, number: int, token_ids: npt.NDArray[np.int32]) -> None:
        self.id = f"row-{number}"
        self.tokens: list[int] = token_ids.tolist()
        self.prompt_len = len(self.tokens)
        self.params = GREEDY  # drafts are verified as argmax chains, whatever the request samples with
        self.owner = ""
        self.max_drafts = 0
        self.seen_s = 0.0
        self._digest = digest_of(self.tokens)

    @property
    def base(self) -> int:
        return len(self.tokens)

    @property
    def max_depth(self) -> int:
        """Trees reach beyond a chain: what hangs below it is for the chain after."""
        return 2 * self.max_drafts + 2

    @property
    def key(self) -> TreeKey:
        return TreeKey(self.id, 0, self.base, self._digest)

    @property
    def mark(self) -> Mark:
        return self.base, np.array(self.tokens[-MARK_TOKENS:], np.int32).tobytes()

    def extend(self, token_ids: Sequence[int]) -> None:
        self.tokens.extend(token_ids)
        self._digest = digest_of(token_ids, self._digest)


class RowTexts:
    """All texts that are followed. Not thread-safe."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._by_mark: dict[Mark, list[RowText]] = defaultdict(list)

    def __len__(self) -> int:
        return sum(map(len, self._by_mark.values()))

    def __iter__(self) -> Iterator[RowText]:
        return itertools.chain.from_iterable(self._by_mark.values())

    def follow(self, rows: Iterable[Row], now: float) -> list[tuple[RowText | None, bool]]:
        """Each row's text with the step's tokens added, and whether it is one not seen before.

        No text for rows without new tokens, and for those that want no guesses.
        """
        found: list[tuple[RowText | None, bool]] = []
        moved: list[RowText] = []
        for row in rows:
            if not row.new or not row.max_drafts:
                found.append((None, False))
                continue
            before, after = row.token_ids[: -row.new], row.token_ids[-row.new :].tolist()
            if known := self._by_mark.get(mark_of(before)):
                text, new = known.pop(), False
            else:
                text, new = RowText(next(self._numbers), before), True
            text.extend(after)
            text.seen_s, text.max_drafts = now, row.max_drafts
            moved.append(text)
            found.append((text, new))
        for text in moved:
            self._by_mark[text.mark].append(text)
        return found

    def forget(self, now: float, latest_s: float) -> list[RowText]:
        """Texts not seen for ``FORGET_AFTER_S``, which are followed no longer.

        ``latest_s``: when the latest step's rows were shown. Those that were among them may be in a long step, and stay
        for ``LINGER_S``.
        """
        ended: list[RowText] = []
        for mark in list(self._by_mark):
            kept: list[RowText] = []
            for text in self._by_mark.pop(mark):
                patience = LINGER_S if text.seen_s >= latest_s else FORGET_AFTER_S
                (ended if now - text.seen_s > patience else kept).append(text)
            if kept:
                self._by_mark[mark] = kept
        return ended


def mark_of(token_ids: npt.NDArray[Any]) -> Mark:
    return len(token_ids), np.ascontiguousarray(token_ids[-MARK_TOKENS:], np.int32).tobytes()

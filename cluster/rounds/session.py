"""One sequence being generated: its tokens, and the rules by which a block of accepted tokens becomes output.

Read this first: everything else in ``cluster.rounds`` moves sessions through rounds, and a round ends here. Knows
nothing of models, drafters or threads. ``docs/round.md`` tells the whole life of a request.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.core.types import (
    Commit,
    FinishReason,
    GenerateRequest,
    Origin,
    Speculation,
    SpeculationStats,
    StreamItem,
    TreeKey,
    digest_of,
)
from cluster.core.warp import History
from cluster.rounds.detokenize import TextStream

_LIVES = itertools.count(1)


class Phase(enum.Enum):
    """Where a session stands in the scheduler."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends a session besides its own parameters."""

    max_model_len: int
    eos_token_ids: frozenset[int]


class Session:
    """State of one generation. ``tokens`` is prompt + resumed + emitted; its length is the session's *base*.

    ``id`` is the request's id and a number of its own: clients may use a request id again at once, and what drafters,
    leases and late replies still hold of the earlier session must not be taken for the new one's.
    """

    def __init__(self, request: GenerateRequest, limits: Limits, text: TextStream) -> None:
        self.request = request
        self.number = next(_LIVES)
        self.id = f"{request.request_id}#{self.number}"
        self.params = request.params
        self.prompt_len = len(request.prompt_token_ids)
        self.tokens = list(request.prompt_token_ids)
        self.phase = Phase.WAITING
        self.slot = -1
        self.num_admitted = 0
        self.output_at_admission = 0
        self.cached_tokens = 0
        self.arrived_s = 0.0  # set by the scheduler
        self.last_item_s: float | None = None  # set by its meter
        self.finish_reason: FinishReason | None = None
        self._limits = limits
        self._text = text
        self._digest = digest_of(self.tokens)
        self._first_item = True
        self._rounds = self._drafted = self._accepted = 0
        self._by_origin = [0, 0, 0]
        eos = frozenset[int]() if self.params.ignore_eos else limits.eos_token_ids
        self.stop_ids = eos | frozenset(self.params.stop_token_ids)
        self.history = History(request.prompt_token_ids, (), self.params)
        for token in request.resume_token_ids:
            # Delivered earlier: the same rules, so that held-back text, counts and stops stand where they stood.
            if self.finish_reason is None:
                self._append(token)
        self._text.take()

    @property
    def owner(self) -> str:
        return self.request.owner

    @property
    def speculation(self) -> Speculation:
        return self.request.speculation

    @property
    def base(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def key(self) -> TreeKey:
        return TreeKey(self.id, self.request.epoch, self.base, self._digest)

    @property
    def max_depth(self) -> int:
        """How deep a tree may be: one token of the block is always the bonus, and all must fit the limits."""
        tokens_left = self.params.max_tokens - self.num_output
        return min(tokens_left, self._limits.max_model_len - self.base) - 1

    @property
    def stats(self) -> SpeculationStats:
        small, medium = self._by_origin[Origin.SMALL], self._by_origin[Origin.MEDIUM]
        return SpeculationStats(
            self._rounds, self._drafted, self._accepted, (self._by_origin[Origin.TARGET], small, medium)
        )

    def admit(self, slot: int, reused: int) -> None:
        """The session gets a KV slot that holds K/V of its first ``reused`` tokens."""
        if not self.num_admitted:
            self.cached_tokens = min(reused, self.prompt_len)
        self.num_admitted += 1
        self.output_at_admission = self.num_output
        self.slot = slot
        self.phase = Phase.PREFILL if reused < self.base - 1 else Phase.DECODE

    def vacate(self, phase: Phase) -> None:
        """The session's slot was taken from it: it waits again, or is finished. Its tokens and its text stay."""
        self.slot, self.phase = -1, phase

    def advance(self, token_ids: Sequence[int], origins: Sequence[Origin], drafted: int) -> tuple[StreamItem, Commit]:
        """Apply one round's block (accepted path plus bonus token), token by token, each as if it were its own round.

        Everything after the first stop is dropped: from the item, the statistics and the commit.
        """
        base, kept = self.base, 0
        for token in token_ids:
            self._append(token)
            kept += 1
            if self.finish_reason is not None:
                break
        self._rounds += 1
        self._drafted += drafted
        self._accepted += sum(origin is not Origin.TARGET for origin in origins[:kept])
        for origin in origins[:kept]:
            self._by_origin[origin] += 1
        emitted = tuple(self.tokens[base:])
        return self._item(emitted, tuple(origins[:kept])), Commit(self.key, base, emitted)

    def closing_item(self) -> StreamItem:
        """The item of a session that ends without a round: its resumed tokens already held a stop."""
        return self._item((), ())

    def _item(self, emitted: tuple[int, ...], origins: tuple[Origin, ...]) -> StreamItem:
        item = StreamItem(
            request_id=self.request.request_id,
            token_ids=emitted,
            origins=origins,
            position=self.num_output - len(emitted),
            text=self._text.take(),
            stats=self.stats,
            seed=self.params.seed if self._first_item else None,
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_len,
            cached_tokens=self.cached_tokens,
        )
        self._first_item = False
        return item

    def _append(self, token: int) -> None:
        """One emitted token through the stop rules, in design order: stop ids, text, stop strings, length."""
        self.tokens.append(token)
        self._digest = digest_of((token,), self._digest)
        self.history.extend((token,))
        if token in self.stop_ids or self._text.push(token, self.num_output >= self.params.min_tokens):
            self._finish(FinishReason.STOP)
        elif self.num_output >= self.params.max_tokens or self.base >= self._limits.max_model_len:
            self._finish(FinishReason.LENGTH)

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._text.close()

"""The one interface every way of guessing implements: ``begin / propose / commit / end``, keyed by session id.

A drafter is a plain class without threads or Ray; its host (the engine thread, or ``cluster.rounds.draft_worker``)
calls it from one thread. A wrong guess costs time, never correctness. ``docs/add_a_drafter.md`` walks through adding
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin, SamplingParams


@dataclass(frozen=True, slots=True)
class Ask:
    """A wish for a tree: at most ``max_nodes`` nodes, none deeper than ``max_depth`` (both at least 1).

    ``outcomes``: the verifier takes chains and asks for the step after. What it has verified by then is the tree's best
    path or a part of it, so breadth beside that path is worth more than depth. ``min_score``: nodes of a lower score
    would not be verified. A drafter that makes no difference may ignore both.
    """

    session_id: str
    max_nodes: int
    max_depth: int
    outcomes: bool = False
    min_score: float = 0.0


class Drafter(Protocol):
    """Guesses for many sessions at once. All methods raise ``UnknownSession`` for a session that was not begun."""

    stage: Origin
    """The stage whose colour this drafter's own nodes carry."""

    vocab_size: int | None
    """Size of the vocabulary it guesses in; None where any token id will do (n-gram matching)."""

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        """Start a session whose committed tokens are ``token_ids``, of which ``prompt_len`` are the prompt.

        Beginning a session that exists already replaces it: that is a resync. ``owner``: whose text it is. What one
        owner's sessions leave behind may serve that owner's alone, and nobody's where the owner is not known ("").
        """
        ...

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        """Trees that hang on each session's last committed token; a session without a guess may be left out.

        ``upstream``: trees of the stage before, by session id, hints only. Returned trees have key None.
        """
        ...

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        """The target emitted ``token_ids``; what was guessed beyond them is void."""
        ...

    def end(self, session_id: str) -> None:
        """Free everything held for the session. Ending an unknown session is allowed and does nothing."""
        ...


@runtime_checkable
class Learner(Protocol):
    """A drafter that gets better while it serves."""

    def study(self) -> bool:
        """One small step of learning; False where there is nothing to learn. Called between rounds only.

        ``cluster/rounds/study.py`` says how often: in idle time, and in a small share of the rest.
        """
        ...

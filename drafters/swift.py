"""SWIFT: the target itself as drafter, with some of its sub-layers left out (arXiv 2410.06916).

Idea: a layer-skipped target agrees with itself often enough to guess well, and needs no training. Cost: a draft pass is
the kept share of a target pass. Two forms of one class. *Colocated* it runs on the target's rank between verify steps,
on the target's own K/V: no second copy of the weights, nothing allocated or committed, and its scratch rows are
overwritten by the next verify step. On its *own* rank it holds the full weights and runs committed tokens through all
of them, since a skipped model reads a cache of its own making far worse than the full model's (0.14 against 0.62
agreement for SmolLM2 with 12 of 56 skipped); only guesses are skipped, and their K/V is never kept.

Which sub-layers: a list, an even spread, a set found beforehand, or one that is searched on the fly from the text being
generated (``study``, ``skip_search.py``). There is one set for all sessions, so that a batch of them takes one pass.
SWIFT's early stop and its siblings by confidence are what ``growth.py`` does: passes end where the likeliest path has
become too unlikely, and the budget goes to the best nodes, next to none of them beside a token that is sure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.core.errors import ConfigError
from cluster.core.types import Origin, SamplingParams
from cluster.engine.model_config import DecoderConfig
from cluster.engine.rank import Rank
from cluster.engine.tensor_parallel import ShardedRank
from drafters.draft_model import ModelDrafter, OwnSlots, Slots
from drafters.options import SwiftOptions
from drafters.skip_learner import SkipLearner
from drafters.skip_proposals import SkipSpace, make_proposer
from drafters.skip_search import SkipSearch
from drafters.skip_sets import find_set


class TargetSlots:
    """The target's slots, borrowed between verify steps. ``slot_of``: None where a session has none."""

    max_lead = 1
    prefills = False

    def __init__(self, slot_of: Callable[[str], int | None]) -> None:
        self._slot_of = slot_of

    def begin(self, session_id: str, token_ids: Sequence[int], held: Sequence[int]) -> None:
        """The target has allocated the slot."""

    def slot(self, session_id: str) -> int | None:
        return self._slot_of(session_id)

    def keep(self, session_id: str, rows: Sequence[int]) -> None:
        """The verifier commits; what is in the scratch is void."""

    def end(self, session_id: str) -> None:
        """The target frees the slot."""


class SwiftDrafter(ModelDrafter):
    """The layer-skipped target: colocated where ``slot_of`` is given, with a rank of its own otherwise."""

    def __init__(
        self,
        rank: Rank,
        options: SwiftOptions,
        *,
        max_len: int,
        stage: Origin = Origin.MEDIUM,
        slot_of: Callable[[str], int | None] | None = None,
    ) -> None:
        if slot_of is not None and rank.kv.scratch < options.guess_rows + 1:
            raise ConfigError(
                f"max_upstream, passes, expand_per_pass: guesses take {options.guess_rows + 1} rows of a slot,"
                f" the engine's max_rows gives {rank.kv.scratch}"
            )
        self.learner = make_learner(rank, options, colocated=slot_of is not None)
        skip = self.learner.search.incumbent if self.learner else starting_set(options, rank.config)
        slots: Slots = OwnSlots(rank.kv, options.prefill_chunk) if slot_of is None else TargetSlots(slot_of)
        lead_skip = skip if slot_of is not None else frozenset[int]()
        super().__init__(rank, slots, options, max_len=max_len, stage=stage, skip=skip, lead_skip=lead_skip)

    @property
    def skip(self) -> frozenset[int]:
        """The sub-layers that guesses leave out now."""
        return self._skip

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        super().begin(session_id, token_ids, params, prompt_len, owner)
        slot = self._slots.slot(session_id)
        if self.learner is not None and slot is not None:
            self.learner.begin(session_id, slot, self._session(session_id).tokens, prompt_len, params)

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        super().commit(session_id, token_ids)
        slot = self._slots.slot(session_id)
        if self.learner is not None and slot is not None:
            self.learner.computed(session_id, self._rank.kv.length(slot))

    def end(self, session_id: str) -> None:
        if self.learner is not None:
            self.learner.end(session_id)
        super().end(session_id)

    def study(self) -> bool:
        """One small step of the search for a better set. To be called between rounds; see ``cluster/rounds/study.py``.

        False where there is nothing to learn, or no search.
        """
        if self.learner is None or not self.learner.study():
            return False
        self._skip = self._lead_skip = self.learner.search.incumbent
        return True


def make_learner(rank: Rank, options: SwiftOptions, *, colocated: bool) -> SkipLearner | None:
    """The search that ``skip: search:COUNT`` asks for; None for a fixed set. Raises ``ConfigError``.

    It goes on where ``keep_in`` was left, or begins with the set found beforehand, or an even spread.
    """
    kind, count = _kind(options.skip)
    if kind != "search":
        return None
    if not colocated or isinstance(rank, ShardedRank):
        raise ConfigError("skip: search:COUNT takes a drafter in the process of a target of one rank; else found:COUNT")
    config = rank.config
    space = SkipSpace(config.num_layers, count)
    proposer = make_proposer(options.proposals, space, options.search_seed)
    keep_in = Path(options.keep_in).expanduser() if options.keep_in else None
    if keep_in is not None and keep_in.is_file():
        try:
            search = SkipSearch.restore(space, proposer, json.loads(keep_in.read_text()))
        except (KeyError, ValueError) as error:
            raise ConfigError(f"keep_in: {keep_in} holds no search: {error}") from None
    else:
        uniform = uniform_skip(config.num_layers, count)
        search = SkipSearch(space, proposer, starting_set(options, config), library=[uniform])
    return SkipLearner(rank, search, rows=min(options.study_rows, rank.kv.scratch), keep_in=keep_in)


def uniform_skip(num_layers: int, count: int) -> frozenset[int]:
    """``count`` sub-layers spread evenly over layers 1 .. num_layers - 2, attention and MLP in turn.

    The first and last layer are kept. Example: ``uniform_skip(6, 4)`` leaves out attention of layers 1 and 3 and the
    MLP of layers 2 and 4. Raises ``ConfigError`` where there are not so many.
    """
    inner = max(0, num_layers - 2)
    if not 0 <= count <= 2 * inner:
        raise ConfigError(f"skip: uniform:{count} is outside [0, {2 * inner}], what {num_layers} layers allow")
    attentions, mlps = (count + 1) // 2, count // 2
    attention_layers = {1 + int((i + 0.25) * inner / attentions) for i in range(attentions)}
    mlp_layers = {1 + int((i + 0.75) * inner / mlps) for i in range(mlps)}
    return frozenset({2 * layer for layer in attention_layers} | {2 * layer + 1 for layer in mlp_layers})


def parse_skip(skip: str | Sequence[int], num_layers: int) -> frozenset[int]:
    """The set an option names by itself: a list of sub-layers, or ``uniform:COUNT``. Raises ``ConfigError``."""
    _, count = _kind(skip)
    if isinstance(skip, str):
        return uniform_skip(num_layers, count)
    wrong = [sub_layer for sub_layer in skip if not 0 <= sub_layer < 2 * num_layers]
    if wrong:
        raise ConfigError(f"skip: {wrong} outside [0, {2 * num_layers}), the sub-layers of {num_layers} layers")
    return frozenset(skip)


def starting_set(options: SwiftOptions, config: DecoderConfig) -> frozenset[int]:
    """What ``skip`` names, files of sets included: where nothing was found beforehand, an even spread."""
    kind, count = _kind(options.skip)
    found = find_set(options.sets, config, count) if kind in ("found", "search") else None
    return parse_skip(options.skip, config.num_layers) if found is None else found


def _kind(skip: str | Sequence[int]) -> tuple[str, int]:
    """How the sub-layers are chosen, and how many. Example: ``found:12`` gives ("found", 12)."""
    if not isinstance(skip, str):
        return "list", len(skip)
    kind, _, count = skip.partition(":")
    if kind not in ("uniform", "found", "search") or not count.isdecimal():
        raise ConfigError(f"skip: {skip!r} is neither a list of sub-layers nor uniform:COUNT, found: or search:COUNT")
    return kind, int(count)

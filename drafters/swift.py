"""SWIFT: the target itself as drafter, with a fixed set of its sub-layers left out (arXiv 2410.06916).

Idea: a layer-skipped target agrees with itself often enough to guess well, and needs no training. Cost: a draft pass is
the kept share of a target pass. Two forms of one class. *Colocated* it runs on the target's rank between verify steps,
on the target's own K/V: no second copy of the weights, nothing allocated or committed, and its scratch rows are
overwritten by the next verify step. On its *own* rank it holds the full weights and runs committed tokens through all
of them, since a skipped model reads a cache of its own making far worse than the full model's (0.14 against 0.62
agreement for SmolLM2 with 12 of 56 skipped); only guesses are skipped, and their K/V is never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.core.errors import ConfigError
from cluster.core.types import Origin
from cluster.engine.rank import Rank
from drafters.draft_model import ModelDrafter, OwnSlots, Slots
from drafters.options import SwiftOptions


class TargetSlots:
    """The target's slots, borrowed between verify steps. ``slot_of`` raises KeyError where a session has none."""

    max_lead = 1
    prefills = False

    def __init__(self, slot_of: Callable[[str], int]) -> None:
        self._slot_of = slot_of

    def begin(self, session_id: str, token_ids: Sequence[int], held: Sequence[int]) -> None:
        """The target has allocated the slot."""

    def slot(self, session_id: str) -> int | None:
        try:
            return self._slot_of(session_id)
        except KeyError:
            return None

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
        slot_of: Callable[[str], int] | None = None,
    ) -> None:
        skip = parse_skip(options.skip, rank.config.num_layers)
        if slot_of is not None and rank.kv.scratch < options.guess_rows + 1:
            raise ConfigError(
                f"max_upstream, passes, expand_per_pass: guesses take {options.guess_rows + 1} rows of a slot,"
                f" the engine's max_rows gives {rank.kv.scratch}"
            )
        slots: Slots = OwnSlots(rank.kv, options.prefill_chunk) if slot_of is None else TargetSlots(slot_of)
        lead_skip = skip if slot_of is not None else frozenset[int]()
        super().__init__(rank, slots, options, max_len=max_len, stage=stage, skip=skip, lead_skip=lead_skip)


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
    """The set an option names: a list of sub-layers, or ``uniform:COUNT``. Raises ``ConfigError``."""
    if isinstance(skip, str):
        kind, _, count = skip.partition(":")
        if kind != "uniform" or not count.isdecimal():
            raise ConfigError(f"skip: {skip!r} is neither a list of sub-layers nor uniform:COUNT")
        return uniform_skip(num_layers, int(count))
    wrong = [sub_layer for sub_layer in skip if not 0 <= sub_layer < 2 * num_layers]
    if wrong:
        raise ConfigError(f"skip: {wrong} outside [0, {2 * num_layers}), the sub-layers of {num_layers} layers")
    return frozenset(skip)

"""The KV cache: static slots, each a committed prefix with the scratch rows of the current round right behind it.

A slot of length L holds the keys and values of positions 0 ... L-1, then scratch row i at index L + i. Scratch rows
form a tree (or a prompt's chain); ``commit`` keeps one root-to-node path of it. A freed slot may keep its committed
positions for whoever begins with the same tokens; which tokens these are is the scheduler's to know. docs/round.md
tells the story.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from cluster.core.errors import Overloaded
from cluster.engine.kv_store import CPU, KVStore, Move
from cluster.engine.model_config import DecoderConfig

Int32Array = npt.NDArray[np.int32]

FILL_VALUE = 2.0**-7


@dataclass(frozen=True, slots=True)
class SlotRows:
    """The rows of one KV slot in a step.

    tokens:  (n,) int32.
    parents: (n,) int32, index of the parent among the slot's scratch rows: rows kept from earlier passes of this round
             come first, then these. -1 hangs directly on the committed prefix.
    scratch_start: scratch index of the first of these rows, that is, how many rows of earlier passes are kept.
    logits:  which of the rows need the LM head: all, none, or (n,) bool.
    """

    slot: int
    tokens: Int32Array
    parents: Int32Array
    scratch_start: int = 0
    logits: bool | npt.NDArray[np.bool_] = True


@dataclass(slots=True)
class _Slot:
    """``paths[i]``: scratch indices from the root down to scratch row i, itself included.

    ``length``: committed positions; of a free slot, those it still keeps. ``tenant``: who wrote them, by number.
    """

    owned: bool = False
    length: int = 0
    tenant: int = 0
    paths: list[Int32Array] = field(default_factory=list)


class KVCache(KVStore):
    """Keys and values of all layers and slots, with the bookkeeping of who owns what."""

    def __init__(
        self,
        config: DecoderConfig,
        num_slots: int,
        capacity: int,
        scratch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        super().__init__(config, num_slots, capacity, scratch, dtype, device)
        self._slots = [_Slot() for _ in range(num_slots)]
        self._free = list(range(num_slots))
        self._tenants = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free_slots(self) -> dict[int, int]:
        """Each with the number of its last tenant: whoever took the slot in between has overwritten what it kept."""
        return {slot: self._slots[slot].tenant for slot in self._free}

    @property
    def usage(self) -> float:
        """Share of all positions that running sessions hold."""
        return sum(slot.length for slot in self._slots if slot.owned) / (self.num_slots * self.capacity)

    def allocate(self, slot: int | None = None, keep: int = 0) -> int:
        """Take a free slot, any one or ``slot``, with the first ``keep`` of the positions it was freed with.

        Raises ``Overloaded`` when there is none, ``ValueError`` where ``slot`` is taken or keeps fewer positions.
        """
        if not self._free:
            raise Overloaded(f"all {self.num_slots} KV slots are in use")
        if slot is None:
            slot = self._free[-1]
        if slot not in self._free or not 0 <= keep <= self._slots[slot].length:
            raise ValueError(f"KV slot {slot} is not free with {keep} positions kept")
        self._free.remove(slot)
        self._tenants += 1
        self._slots[slot] = _Slot(owned=True, length=keep, tenant=self._tenants)
        return slot

    def free(self, slot: int, keep: int = 0) -> None:
        """Give a slot back; its first ``keep`` committed positions may be read or taken over until it is taken again.

        Raises ``ValueError`` if it is not owned or holds fewer.
        """
        state = self._owned(slot)
        if not 0 <= keep <= state.length:
            raise ValueError(f"slot {slot} holds {state.length} positions, not {keep}")
        self._slots[slot] = _Slot(length=keep, tenant=state.tenant)
        self._free.append(slot)

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first ``length`` committed positions of ``source``, owned or free, all that ``target`` holds.

        Raises ``ValueError`` where ``source`` holds fewer, ``target`` is not owned, or they are the same slot.
        """
        state = self._owned(target)
        if source == target or not 0 <= length <= self._slots[source].length:
            raise ValueError(f"slot {source} cannot give {length} positions to slot {target}")
        self.move(Move(source, range(length), target, 0))
        state.length, state.paths = length, []

    def fill(self, slot: int, length: int) -> None:
        """Make the slot hold ``length`` positions of one arbitrary value: for measuring what a context costs.

        Raises ``ValueError`` beyond the capacity.
        """
        state = self._owned(slot)
        if not 0 <= length <= self.capacity:
            raise ValueError(f"slot {slot}: {length} positions exceed the capacity {self.capacity}")
        self._data[:, :, slot, :length] = FILL_VALUE
        state.length, state.paths = length, []

    def length(self, slot: int) -> int:
        """Committed positions of the slot."""
        return self._owned(slot).length

    def tenant(self, slot: int) -> int:
        """The number of who holds the slot, or of a free one's last tenant."""
        return self._slots[slot].tenant

    def add_scratch(self, rows: SlotRows) -> list[Int32Array]:
        """Record the rows a step is about to write; what lay behind ``scratch_start`` is void.

        Returns each row's path: scratch indices root first, the row itself last. Raises ``ValueError`` for rows that do
        not fit or whose parents do not stand before them.
        """
        state, start, count = self._owned(rows.slot), rows.scratch_start, len(rows.tokens)
        if not 0 <= start <= len(state.paths):
            raise ValueError(f"scratch_start {start}: slot {rows.slot} holds {len(state.paths)} scratch rows")
        if state.length + start + count > self.slot_size:
            raise ValueError(f"{start + count} rows behind {state.length} positions exceed {self.slot_size}")
        parents, order = rows.parents.tolist(), range(start, start + count)
        if len(parents) != count or not all(-1 <= parent < row for parent, row in zip(parents, order)):
            raise ValueError(f"slot {rows.slot}: a parent does not stand before its child")
        paths = state.paths[:start]
        if count and parents[1:] == list(order[:-1]):
            above = paths[parents[0]].tolist() if parents[0] >= 0 else []
            chain = np.array([*above, *order], np.int32)
            paths += [chain[: len(above) + row + 1] for row in range(count)]
        else:
            for row, parent in enumerate(parents, start):
                here = np.array([row], np.int32)
                paths.append(np.concatenate([paths[parent], here]) if parent >= 0 else here)
        state.paths = paths
        return paths[start:]

    def commit(self, slot: int, rows: Sequence[int]) -> None:
        """Keep these scratch rows, a root-to-node path in order, as the next positions; all other scratch is void.

        Example: length 10, rows [0, 2]: scratch row 2 moves from index 12 to 11, the length becomes 12.
        Raises ``ValueError`` if the rows are not such a path or exceed the capacity.
        """
        state = self._owned(slot)
        path = list(rows)
        if path and not (0 <= path[-1] < len(state.paths) and state.paths[path[-1]].tolist() == path):
            raise ValueError(f"slot {slot}: rows {path} are not a path from the root through its scratch")
        if state.length + len(path) > self.capacity:
            raise ValueError(f"slot {slot}: {state.length} + {len(path)} positions exceed the capacity {self.capacity}")
        first_moved = next((index for index, row in enumerate(path) if row != index), len(path))
        if first_moved < len(path):
            self.move(Move(slot, [state.length + row for row in path[first_moved:]], slot, state.length + first_moved))
        state.length += len(path)
        state.paths = []

    def truncate(self, slot: int, length: int) -> None:
        """Roll back to a shorter committed length; scratch is void. Raises ``ValueError`` if it is longer."""
        state = self._owned(slot)
        if not 0 <= length <= state.length:
            raise ValueError(f"slot {slot}: cannot truncate {state.length} positions to {length}")
        state.length = length
        state.paths = []

    def check(self) -> None:
        """Verify the bookkeeping; cheap enough for every round. Raises ``RuntimeError`` naming the breach."""
        owned = sum(slot.owned for slot in self._slots)
        if len(set(self._free)) != len(self._free) or len(self._free) + owned != self.num_slots:
            raise RuntimeError(f"{len(self._free)} free + {owned} owned slots are not {self.num_slots}")
        for index, slot in enumerate(self._slots):
            if slot.owned == (index in self._free):
                raise RuntimeError(f"slot {index} is both free and owned, or neither")
            if not 0 <= slot.length <= self.capacity or slot.length + len(slot.paths) > self.slot_size:
                raise RuntimeError(
                    f"slot {index}: length {slot.length} with {len(slot.paths)} scratch rows is too long"
                )
            if not slot.owned and slot.paths:
                raise RuntimeError(f"free slot {index} still holds {len(slot.paths)} scratch rows")

    def _owned(self, slot: int) -> _Slot:
        if not 0 <= slot < self.num_slots or not self._slots[slot].owned:
            raise ValueError(f"KV slot {slot} is not allocated")
        return self._slots[slot]

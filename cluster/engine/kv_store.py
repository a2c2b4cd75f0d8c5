"""Where keys and values lie: the memory of a KV cache, without the bookkeeping of who owns what in it.

A rank that follows another needs no more than this: which rows to read and write comes with each step, and which
positions to move comes as ``Move``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from cluster.core.errors import ConfigError
from cluster.engine import huge_pages
from cluster.engine.model_config import DecoderConfig

CPU = torch.device("cpu")
WORKING_ROOM = 1 << 30  # bytes that a GPU keeps for a step's own tensors
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Move(NamedTuple):
    """Copy all layers' keys and values at ``positions`` of slot ``source`` to ``start`` and on of slot ``target``."""

    source: int
    positions: Sequence[int]
    target: int
    start: int


class KVStore:
    """Keys and values of all layers and slots.

    ``keys[layer]``, ``values[layer]``: (slots, capacity + scratch, kv_heads, head_dim). ``capacity`` bounds a slot's
    committed length; ``scratch`` is the room a full slot still has for a round's rows. Raises ``ConfigError`` where a
    GPU has no room for them.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_slots: int,
        capacity: int,
        scratch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        self.num_slots, self.capacity, self.scratch = num_slots, capacity, scratch
        shape = (config.num_layers, 2, num_slots, capacity + scratch, config.num_kv_heads, config.head_dim)
        # Zeros, not garbage: the torch kernels read keys that they then mask, and 0 * NaN would show.
        on_cpu = device.type == "cpu"
        if not on_cpu:
            check_room(math.prod(shape) * dtype.itemsize, torch.cuda.mem_get_info(device)[0], num_slots, capacity)
        self._data = huge_pages.zeros(shape, dtype) if on_cpu else torch.zeros(shape, dtype=dtype, device=device)
        # Moves go through numpy there: torch would share them out to threads that spin on beside the kernels'.
        bits = self._data.view(_INTEGERS[dtype.itemsize])
        self._bits: Any = bits.numpy() if on_cpu else bits
        self.keys = [self._data[layer, 0] for layer in range(config.num_layers)]
        self.values = [self._data[layer, 1] for layer in range(config.num_layers)]

    @property
    def slot_size(self) -> int:
        """Positions of one slot: capacity plus scratch."""
        return self.capacity + self.scratch

    @property
    def num_bytes(self) -> int:
        """What keys and values take once every slot is full; pages never written to take nothing."""
        return self._data.numel() * self._data.element_size()

    def move(self, move: Move) -> None:
        """Source and target may be the same slot; positions are read before any is written."""
        positions = move.positions
        chosen = slice(positions.start, positions.stop) if isinstance(positions, range) else np.array(positions)
        moved = self._bits[:, :, move.source][:, :, chosen]
        self._bits[:, :, move.target, move.start : move.start + len(positions)] = moved


def check_room(wanted: int, free: int, num_slots: int, capacity: int) -> None:
    """Raises ``ConfigError`` where keys and values of ``wanted`` bytes leave too little of a GPU's ``free`` ones."""
    fitting = max(0, free - WORKING_ROOM) * num_slots // wanted
    if fitting < num_slots:
        raise ConfigError(
            f"kv_slots: {num_slots} of max_model_len {capacity} take {wanted / 2**30:.1f} GiB beside the weights, and "
            f"the GPU has {free / 2**30:.1f} GiB left; allowed here: up to {fitting} slots of this length"
        )

"""An order arrives as it was given."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from engine_steps import TREE_PARENTS, chain, rows

from cluster.engine.kv_cache import KVCache, SlotRows
from cluster.engine.kv_store import Move
from cluster.engine.model_config import decoder_config_from_hf
from cluster.engine.orders import Order, decode, encode
from cluster.engine.rows import StepRows, lay_out


@pytest.fixture
def kv(make_model):  # type: ignore[no-untyped-def]
    cache = KVCache(decoder_config_from_hf(make_model("llama")[0].config), num_slots=3, capacity=16, scratch=8)
    for _ in range(3):
        cache.allocate()
    return cache


BATCHES: list[list[SlotRows]] = [
    [chain(0, [5])],
    [rows(2, range(7), TREE_PARENTS), chain(0, [1, 2, 3], logits=False)],
    [chain(1, [9, 9], logits=np.array([False, True])), chain(2, [4])],
    [chain(1, [9, 9], logits=False)],
]
MOVES = [Move(0, range(3), 2, 0), Move(1, [4, 6], 1, 3)]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("skip", "moves"), [(frozenset(), []), (frozenset({3, 0}), MOVES)])
def test_an_order_is_decoded_as_it_was_encoded(kv, batch, skip, moves) -> None:  # type: ignore[no-untyped-def]
    sent = lay_out(batch, kv, 100)
    got = decode(encode(Order(sent, skip, moves)))
    for field in fields(StepRows):
        before, after = getattr(sent, field.name), getattr(got.rows, field.name)
        if before is None:
            assert after is None
        else:
            assert before.dtype == after.dtype
            assert torch.equal(before, after)
    assert got.skip == skip
    assert [(m.source, list(m.positions), m.target, m.start) for m in got.moves] == [
        (m.source, list(m.positions), m.target, m.start) for m in moves
    ]

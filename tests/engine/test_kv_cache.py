"""Slots, scratch, commit and rollback: the bookkeeping, without a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_steps import TREE_PARENTS, rows
from transformers import LlamaConfig

from cluster.core.errors import ConfigError, Overloaded
from cluster.engine.kv_cache import KVCache
from cluster.engine.kv_store import WORKING_ROOM, check_room
from cluster.engine.weights import decoder_config_from_hf


@pytest.fixture
def kv():
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=16, vocab_size=9)
    return KVCache(decoder_config_from_hf(config), num_slots=3, capacity=12, scratch=8, dtype=torch.float32)


def fill(kv, slot, count, start=0):
    """Number the slot's scratch rows: 100 for row 0, 101 for row 1, ..."""
    for layer in (*kv.keys, *kv.values):
        first = kv.length(slot) + start
        layer[slot, first : first + count] = torch.arange(100 + start, 100 + start + count)[:, None, None].float()


def test_a_committed_path_lies_right_behind_the_prefix_in_every_layer(kv):
    slot = kv.allocate()
    kv.add_scratch(rows(slot, [1, 2], [-1, 0]))
    fill(kv, slot, 2)
    kv.commit(slot, [0, 1])
    kv.add_scratch(rows(slot, range(7), TREE_PARENTS))
    fill(kv, slot, 7)
    kv.commit(slot, [0, 1, 3, 6])
    assert kv.length(slot) == 6
    for layer in (*kv.keys, *kv.values):
        assert layer[slot, :6, 0, 0].tolist() == [100, 101, 100, 101, 103, 106]
    kv.check()


def test_paths_run_from_the_root_and_continue_over_passes(kv):
    slot = kv.allocate()
    first = kv.add_scratch(rows(slot, range(3), TREE_PARENTS[:3]))
    second = kv.add_scratch(rows(slot, range(4), TREE_PARENTS[3:], start=3))
    paths = [path.tolist() for path in first + second]
    assert paths == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 1, 3, 6]]
    kept = kv.add_scratch(rows(slot, [1, 1, 1], [2, 3, 4], start=3))
    assert [path.tolist() for path in kept] == [[0, 2, 3], [0, 2, 3, 4], [0, 2, 3, 4, 5]]


@pytest.mark.parametrize("path", [[1], [0, 3], [0, 2, 3], [7], [0, 1, 1], [-1]])
def test_rows_that_are_no_path_from_the_root_are_not_committed(kv, path):
    slot = kv.allocate()
    kv.add_scratch(rows(slot, range(7), TREE_PARENTS))
    with pytest.raises(ValueError, match="not a path"):
        kv.commit(slot, path)
    assert kv.length(slot) == 0


def test_a_commit_voids_the_scratch_and_so_does_a_rollback(kv):
    slot = kv.allocate()
    kv.add_scratch(rows(slot, [1, 2], [-1, 0]))
    kv.commit(slot, [])
    with pytest.raises(ValueError, match="not a path"):
        kv.commit(slot, [0])
    kv.add_scratch(rows(slot, [1, 2], [-1, 0]))
    kv.commit(slot, [0])
    kv.add_scratch(rows(slot, [1, 2], [-1, 0]))
    kv.truncate(slot, 1)
    with pytest.raises(ValueError, match="holds 0 scratch rows"):
        kv.add_scratch(rows(slot, [1], [0], start=1))
    with pytest.raises(ValueError, match="cannot truncate"):
        kv.truncate(slot, 2)


@pytest.mark.parametrize(
    ("parents", "start"), [([0], 0), ([-1, 1], 0), ([-2], 0), ([-1, 2], 0), ([-1], 1), ([-1] * 21, 0)]
)
def test_rows_that_break_the_order_or_do_not_fit_are_refused(kv, parents, start):
    slot = kv.allocate()
    with pytest.raises(ValueError, match=r"parent|scratch_start|exceed"):
        kv.add_scratch(rows(slot, [1] * len(parents), parents, start=start))


def test_a_commit_beyond_the_capacity_is_refused(kv):
    slot = kv.allocate()
    kv.add_scratch(rows(slot, [1] * 13, np.arange(-1, 12)))
    with pytest.raises(ValueError, match="capacity 12"):
        kv.commit(slot, range(13))
    kv.commit(slot, range(12))
    kv.check()


def test_slots_run_out_come_back_empty_and_are_freed_once(kv):
    slots = [kv.allocate() for _ in range(3)]
    assert sorted(slots) == [0, 1, 2]
    assert kv.num_free == 0
    with pytest.raises(Overloaded, match="3 KV slots"):
        kv.allocate()
    kv.add_scratch(rows(slots[1], [1], [-1]))
    kv.commit(slots[1], [0])
    kv.free(slots[1])
    with pytest.raises(ValueError, match="not allocated"):
        kv.free(slots[1])
    with pytest.raises(ValueError, match="not allocated"):
        kv.length(slots[1])
    assert kv.allocate() == slots[1]
    assert kv.length(slots[1]) == 0
    kv.check()


def test_a_freed_slot_keeps_what_it_is_told_to_until_it_is_taken(kv):
    slot = kv.allocate()
    kv.add_scratch(rows(slot, [1, 2, 3], [-1, 0, 1]))
    fill(kv, slot, 3)
    kv.commit(slot, range(3))
    with pytest.raises(ValueError, match="holds 3"):
        kv.free(slot, keep=4)
    kv.free(slot, keep=2)
    kv.check()
    with pytest.raises(ValueError, match="not free with 3"):
        kv.allocate(slot, keep=3)
    assert kv.allocate(slot, keep=2) == slot
    assert kv.length(slot) == 2
    assert kv.keys[0][slot, :2, 0, 0].tolist() == [100, 101]
    with pytest.raises(ValueError, match="not free"):
        kv.allocate(slot)
    kv.free(slot)
    assert kv.length(kv.allocate(slot)) == 0


def test_a_copy_is_all_that_its_target_holds(kv):
    source, target = kv.allocate(), kv.allocate()
    kv.add_scratch(rows(source, [1, 2, 3], [-1, 0, 1]))
    fill(kv, source, 3)
    kv.commit(source, range(3))
    kv.copy(source, target, 2)
    assert kv.length(target) == 2
    kv.free(source, keep=3)
    kv.copy(source, target, 3)
    for layer in (*kv.keys, *kv.values):
        assert layer[target, :3, 0, 0].tolist() == [100, 101, 102]
    for wrong in ((source, target, 4), (target, target, 1), (target, source, 1)):
        with pytest.raises(ValueError, match=r"cannot give|not allocated"):
            kv.copy(*wrong)
    kv.check()


def test_usage_counts_positions_of_owned_slots_only(kv):
    slot = kv.allocate()
    assert kv.usage == 0.0
    kv.fill(slot, 9)
    assert kv.usage == pytest.approx(9 / 36)
    kv.free(slot, keep=9)
    assert kv.usage == 0.0
    with pytest.raises(ValueError, match="exceed the capacity"):
        kv.fill(kv.allocate(), 13)


def test_check_notices_a_leak_a_double_entry_and_an_impossible_length(kv):
    slot = kv.allocate()
    kv.check()
    kv._free.pop()
    with pytest.raises(RuntimeError, match="1 free"):
        kv.check()
    kv._free += [slot]
    with pytest.raises(RuntimeError, match="both free and owned"):
        kv.check()
    kv._free[-1] = next(index for index in range(3) if index != slot and index not in kv._free)
    kv.check()
    kv._slots[slot].length = 13
    with pytest.raises(RuntimeError, match="too long"):
        kv.check()


def test_slots_that_a_gpu_has_no_room_for_are_refused_with_the_number_that_fits():
    slot = 4 << 30
    check_room(8 * slot, 8 * slot + WORKING_ROOM, 8, 32_768)
    with pytest.raises(ConfigError, match=r"kv_slots: 8 .* 32\.0 GiB .* 24\.0 GiB left; .* up to 5 slots"):
        check_room(8 * slot, 6 * slot, 8, 32_768)

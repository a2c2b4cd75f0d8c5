"""A record replayed as an engine that verifies chains would emit it."""

from __future__ import annotations

from benchmarks.accepted_length import Record
from benchmarks.propose_time import Replay


def test_a_row_gains_what_its_chain_foresaw_and_one_token_more():
    replay = Replay(Record("all", [1, 2], [3, 4, 5, 6, 7]))
    assert (replay.row(4).token_ids.tolist(), replay.row(4).new) == ([1, 2, 3], 1)
    replay.verify([4, 5, 9])
    assert (replay.row(4).token_ids.tolist(), replay.row(4).new) == ([1, 2, 3, 4, 5, 6], 3)
    assert not replay.ended
    replay.verify([7, 8])
    assert (replay.row(4).token_ids.tolist()[-1], replay.row(4).new) == (7, 1)
    assert replay.ended

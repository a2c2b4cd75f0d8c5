"""What a request gains within a short interval leaves as one item, and nothing is lost or reordered."""

from __future__ import annotations

from cluster.core.types import FinishReason, Origin, SpeculationStats, StreamItem
from cluster.rounds.pacing import Pace, Pacer


def item(position: int, *tokens: int, finish: FinishReason | None = None) -> StreamItem:
    return StreamItem(
        request_id="r",
        token_ids=tokens,
        origins=(Origin.SMALL,) * (len(tokens) - 1) + (Origin.TARGET,),
        position=position,
        text="".join(f"<{token}>" for token in tokens),
        stats=SpeculationStats(),
        seed=7 if position == 0 else None,
        finish_reason=finish,
        prompt_tokens=3,
    )


def test_without_an_interval_every_item_leaves_as_it_came() -> None:
    pacer = Pacer()
    for position in range(3):
        pacer.add(item(position, position))
        assert pacer.take(1.0, 0.0) == item(position, position)
    assert pacer.take(1.0, 0.0) is None


def test_the_first_item_leaves_at_once_and_those_within_the_interval_as_one() -> None:
    pacer = Pacer()
    pacer.add(item(0, 5))
    first = pacer.take(10.0, 0.5)
    assert first is not None
    assert first.seed == 7
    pacer.add(item(1, 6, 8))
    assert pacer.take(10.1, 0.5) is None
    pacer.add(item(3, 9))
    assert pacer.take(10.4, 0.5) is None
    joined = pacer.take(10.5, 0.5)
    assert joined is not None
    assert (joined.token_ids, joined.position, joined.text) == ((6, 8, 9), 1, "<6><8><9>")
    assert joined.origins == (Origin.SMALL, Origin.TARGET, Origin.TARGET)
    assert joined.seed is None
    assert pacer.take(99.0, 0.5) is None


def test_the_end_of_a_stream_takes_along_what_was_held() -> None:
    pacer = Pacer()
    pacer.add(item(0, 5))
    pacer.add(item(1, 6, finish=FinishReason.STOP))
    last = pacer.take(0.0, 0.0)
    assert last is not None
    assert (last.token_ids, last.finish_reason, last.seed) == ((5, 6), FinishReason.STOP, 7)


def test_streams_share_the_items_of_a_second() -> None:
    assert Pace().interval_s(8) == 0.0
    assert [Pace(0.04, 50.0).interval_s(streams) for streams in (1, 2, 8)] == [0.04, 0.04, 0.16]
    assert Pace(0.04).interval_s(8) == 0.04

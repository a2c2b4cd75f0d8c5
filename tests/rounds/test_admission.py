"""Who runs next, where, and who makes room: the pure choices."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.core.types import GenerateRequest, SamplingParams
from cluster.rounds.admission import MIN_COPY, MIN_PROGRESS, Placement, PrefixCache, WaitingQueue, choose_victim
from cluster.rounds.detokenize import TextStream
from cluster.rounds.session import Limits, Session

CHAT = list(range(100, 200))
OTHER = list(range(300, 400))


class NoText:
    def step(self, token: int) -> str:
        return ""


def session(name: str = "s", **fields: Any) -> Session:
    request = GenerateRequest(name, (1, 2), SamplingParams(max_tokens=100, ignore_eos=True), **fields)
    return Session(request, Limits(200, frozenset()), TextStream(NoText()))


def names(queue: WaitingQueue) -> list[str]:
    return [waiting.request.request_id for waiting in queue]


def test_the_queue_goes_by_priority_then_replays_then_arrival() -> None:
    queue = WaitingQueue()
    first = session("first")
    for waiting in (
        session("second"),
        session("replay", admitted=True),
        session("urgent", priority=-1),
        first,
        session("late replay", priority=1, admitted=True),
        session("late", priority=1),
    ):
        queue.add(waiting)
    assert names(queue) == ["urgent", "replay", "first", "second", "late replay", "late"]
    assert queue.num_new == 4
    queue.remove(first)
    assert first not in queue
    assert queue.pop().request.request_id == "urgent"


def test_a_preempted_session_stands_before_all_that_came_after_it() -> None:
    early, late = session("early"), session("late")
    queue = WaitingQueue()
    queue.add(late)
    early.admit(0, 0)
    queue.add(early)
    assert names(queue) == ["early", "late"]
    assert queue.num_new == 1


def test_the_lowest_priority_makes_room_and_of_equals_the_youngest() -> None:
    running = [session("a", priority=2), session("b", priority=2), session("c", priority=1), session("d")]
    for at, one in enumerate(running):
        one.admit(at, 0)
    assert choose_victim(session(), running, patient=True) is running[1]
    assert choose_victim(session(priority=1), running[2:], patient=False) is None
    assert choose_victim(session(priority=2), running, patient=False) is None


def test_a_replay_takes_a_new_sessions_slot_only_after_it_has_waited_long() -> None:
    new, replay = session("new"), session("replay", admitted=True)
    for at, one in enumerate((new, replay)):
        one.admit(at, 0)
    waiting = session("waiting", admitted=True)
    assert choose_victim(waiting, [new, replay], patient=True) is None
    assert choose_victim(waiting, [new, replay], patient=False) is new
    assert choose_victim(waiting, [replay], patient=False) is None


def test_nobody_is_preempted_again_before_it_has_made_progress() -> None:
    victim = session(priority=5)
    victim.admit(0, 0)
    victim.admit(0, 0)
    assert choose_victim(session(), [victim], patient=True) is None
    victim.advance([7] * MIN_PROGRESS, [0] * MIN_PROGRESS, 0)  # type: ignore[list-item]
    assert choose_victim(session(), [victim], patient=True) is victim


def free(slots: list[int]) -> dict[int, int]:
    """As the KV cache tells them, all left by their first tenant."""
    return dict.fromkeys(slots, 1)


def test_a_second_turn_takes_over_the_slot_of_the_first() -> None:
    cache = PrefixCache()
    cache.keep(2, 1, CHAT, "")
    cache.keep(0, 1, OTHER, "")
    assert cache.place([*CHAT, 1, 2, 3], "", free([0, 1, 2])) == Placement(2, len(CHAT))
    assert cache.place(CHAT[:60], "", free([0, 1, 2])) == Placement(2, 60)


def test_a_prompt_that_shares_little_of_a_slots_tokens_gets_a_copy_and_leaves_them() -> None:
    cache = PrefixCache()
    cache.keep(2, 1, CHAT, "")
    cache.keep(1, 1, OTHER, "")
    assert cache.place([*CHAT[:40], 1, 2], "", free([0, 1, 2])) == Placement(0, 40, source=2)
    assert cache.place([*CHAT[:40], 1, 2], "", free([1, 2])) == Placement(2, 40)  # there it is the least recently used
    assert cache.place([*CHAT[: MIN_COPY - 1], 1], "", free([0, 1, 2])) == Placement(0, 0)


def test_a_running_sessions_prefix_is_copied_where_it_is_longer() -> None:
    cache = PrefixCache()
    cache.keep(2, 1, [*CHAT[:50], 7], "")
    running = [(0, CHAT, len(CHAT)), (1, OTHER, len(OTHER))]
    assert cache.place(CHAT, "", free([2, 3]), running) == Placement(3, 100, source=0)
    assert cache.place(CHAT[:60], "", free([2, 3]), running) == Placement(2, 50)
    assert cache.place(CHAT, "", free([2]), running) == Placement(2, 100, source=0)
    assert cache.place(CHAT, "", free([3]), [(0, CHAT, 30)]) == Placement(3, 30, source=0), "only so far is there K/V"


def test_what_another_salt_computed_is_not_found() -> None:
    cache = PrefixCache()
    cache.keep(0, 1, CHAT, "mine")
    assert cache.place(CHAT, "", free([0])) == Placement(0, 0)
    assert cache.place(CHAT, "mine", free([0])) == Placement(0, len(CHAT))


def test_what_a_slot_kept_before_someone_else_took_it_is_not_found() -> None:
    cache = PrefixCache()
    cache.keep(0, 1, CHAT, "")
    assert cache.place(CHAT, "", {0: 1}) == Placement(0, len(CHAT))
    assert cache.place(CHAT, "", {0: 2}) == Placement(0, 0)


def test_the_least_recently_used_slot_is_taken_where_nothing_is_shared() -> None:
    cache = PrefixCache()
    for slot in (1, 0, 2):
        cache.keep(slot, 1, OTHER, "")
    assert cache.place(CHAT, "", free([2, 0, 1])) == Placement(1)
    assert cache.place(CHAT, "", free([2, 0, 3])) == Placement(3)


@pytest.mark.parametrize("tokens", [[], [1]])
def test_the_shortest_prompts_need_nothing(tokens: list[int]) -> None:
    cache = PrefixCache()
    cache.keep(0, 1, CHAT, "")
    assert cache.place(tokens, "", free([0]), [(1, CHAT, len(CHAT))]).length == 0

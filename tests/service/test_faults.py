"""Real processes of a real service are killed or stopped under load: no request is lost, no answer is another one.

The same code as ``python -m benchmarks.faults``, which strikes every fault, with fewer requests.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.faults import load, trial
from benchmarks.faults.catalogue import BY_NAME, FAULTS
from benchmarks.faults.liar import LIES, lie
from benchmarks.faults.load import Answer
from benchmarks.faults.page import page
from benchmarks.faults.service import Layout, Rig, running
from benchmarks.soak import Sample, growth, more, short
from cluster.core.errors import InvalidTree
from cluster.core.token_tree import TokenTree
from cluster.core.types import TreeKey
from cluster.rounds.messages import DraftReply, StageReport

REQUESTS = 30
STRUCK_HERE = ("small_killed", "medium_hung", "target_killed", "proxy_killed", "controller_killed")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(Layout(), tmp_path_factory.mktemp("faults")) as made:
        yield made


@pytest.fixture(scope="module")
def expected(rig: Rig) -> dict[int, Answer]:
    answers = load.undisturbed(rig.address)
    assert [answer.error for answer in answers.values()] == [""] * load.KINDS
    return answers


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", STRUCK_HERE)
def test_under_load_the_fault_loses_and_changes_nothing(rig: Rig, expected: dict[int, Answer], name: str) -> None:
    result = trial.run(BY_NAME[name], rig, REQUESTS, expected, print)
    assert result.requests >= REQUESTS
    assert result.sound, result.notes


def test_every_fault_has_a_name_of_its_own_and_states_what_it_promises() -> None:
    assert len(BY_NAME) == len(FAULTS)
    assert all(fault.pause_s > 0 and fault.recovery_s > 0 and fault.because for fault in FAULTS)


def test_a_lying_drafters_trees_are_wrong_each_in_its_own_way() -> None:
    key = TreeKey("s", 0, 8, 1)
    honest = DraftReply({"s": TokenTree.chain((5, 6, 7), key=key)}, (StageReport("small", 1, {"s": 8}),))
    told = [lie(honest, number) for number in range(len(LIES))]
    wrong, outside, circular, oversized, unspoilt = (reply.trees["s"] for reply in told)
    wrong.check(256, 8)
    assert wrong.tokens.tolist() != honest.trees["s"].tokens.tolist()
    for tree, breach in ((outside, "token id"), (circular, "parent"), (oversized, "nodes")):
        with pytest.raises(InvalidTree, match=breach):
            tree.check(256, 8)
    unspoilt.check(256, 8)
    assert told[-1].reports[-1].held["s"] > 8


def test_an_answer_is_compared_by_ids_and_text_and_one_that_was_left_as_far_as_it_went() -> None:
    expected = {kind: Answer(kind, [1, 2, 3], "abc") for kind in range(load.KINDS)}
    made = load.Load("127.0.0.1:1", expected, print)
    made.answers = [
        Answer(0, [1, 2, 3], "abc"),
        Answer(1, [1, 2, 3], "abd"),
        Answer(2, [1, 2], "ab"),
        Answer(load.KINDS, [1, 2], "ab", left=True),
        Answer(4, [1, 3], "ac", left=True),
        Answer(5, [], "", error="UNAVAILABLE: gone"),
    ]
    assert [answer.number for answer in made.differing] == [1, 2, 4]
    assert [answer.number for answer in made.lost] == [5]


def test_growth_is_the_slope_of_the_second_half_for_processes_that_lived_through_it() -> None:
    steady = [Sample(at, 1_000_000 if at < 500 else 2_000_000) for at in range(0, 1000, 20)]
    rising = [Sample(at, 1_000_000 + 100 * at) for at in range(0, 1000, 20)]
    assert growth(steady, 500) == pytest.approx(0.0, abs=1e-9)
    assert growth(rising, 500) == pytest.approx(100_000 / 1_074_000, rel=1e-3)
    assert growth(rising[30:], 500) is None
    assert growth(rising[:26], 500) is None


def test_what_is_left_behind_is_found_by_kind() -> None:
    before = {"actors": {"DraftActor": 2}, "kv_slots": 0}
    assert not more({"actors": {"DraftActor": 2}, "kv_slots": 0}, before, "actors")
    assert more({"actors": {"DraftActor": 2, "RankActor": 1}, "kv_slots": 0}, before, "actors")
    assert more({"actors": {}, "kv_slots": 1}, before, "kv_slots")


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("ray::ServeReplica:paceline:Target.generate", "ray::ServeReplica:paceline:Target"),
        ("ray::DraftActor", "ray::DraftActor"),
        ("/x/raylet/raylet --raylet_socket_name=/tmp/s --python_worker_command=python setup_worker.py", "raylet"),
        ("/x/bin/python -u /x/ray/log_monitor.py --session-dir=/tmp/s", "log_monitor.py"),
    ],
)
def test_processes_have_short_names(title: str, name: str) -> None:
    assert short(title) == name


def test_the_page_has_a_row_for_each_result_and_says_what_was_left_out() -> None:
    result = {
        "fault": "small_killed",
        "requests": 117,
        "lost": 0,
        "differing": 0,
        "replays": 2,
        "longest_pause_s": 0.26,
        "recovery_s": None,
    }
    facts = {"cores": 2, "cpu": "a CPU", "revision": "abc", "date": "today", "note": "Busy."}
    text = page([result], {"drafters_cut_off": "no root"}, facts, 6)
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {BY_NAME['small_killed'].what}")]
    assert "| 117 | 0 | 0 | 2 | 0.3 (5) | **did not recover** (40) |" in row
    assert "drafters_cut_off: no root" in text
    (absent,) = [line for line in text.splitlines() if line.startswith("Not measured yet: ")]
    assert "rank_killed" in absent
    assert "drafters_cut_off" not in absent
    assert "a CPU, revision abc, today. Busy." in text

"""Whose time a drafter that learns takes."""

from __future__ import annotations

import random

import pytest
from engine_rig import LENGTH, Rig, ask, run
from fakes import ScriptedDrafter, empty
from simulation import CPU, Machine, Text, fixed, governed
from tiny import save_tiny_llama

from cluster.engine.rank import Rank, build_rank
from cluster.rounds.study import StudyTime
from drafters.base import Learner


class Student(ScriptedDrafter):
    """Takes ``step_s`` of a simulated clock for each of ``lessons`` steps."""

    def __init__(self, step_s: float = 0.0, lessons: int = 1_000_000) -> None:
        super().__init__(empty)
        self.now = 0.0
        self.step_s = step_s
        self.lessons = lessons
        self.steps = 0
        self.fails = False

    def study(self) -> bool:
        if self.steps == self.lessons:
            return False
        self.now += self.step_s
        self.steps += 1
        if self.fails:
            raise RuntimeError("out of ideas")
        return True


def studying(student: Student) -> StudyTime:
    assert isinstance(student, Learner)
    return StudyTime(student, clock=lambda: student.now)


@pytest.mark.parametrize("step_s", [0.002, 0.02, 0.2, 2.0])
def test_busy_hours_give_a_learner_two_percent_at_most(step_s: float) -> None:
    student = Student(step_s)
    time = studying(student)
    draw = random.Random(0)
    for _ in range(30_000):
        time.earn(draw.uniform(0.004, 0.012))
        time.step(idle=False)
    assert time.busy_s == pytest.approx(240, rel=0.01)
    assert time.spent_s <= 0.02 * time.busy_s + step_s
    assert time.spent_s >= 0.01 * time.busy_s


def test_idle_hours_are_the_learners_and_count_as_nobodys() -> None:
    student = Student(0.02)
    time = studying(student)
    assert [time.step(idle=True) for _ in range(5)] == [True] * 5
    assert time.spent_s == 0.0


def test_a_learner_that_fails_is_left_alone() -> None:
    student = Student(0.02)
    student.fails = True
    time = studying(student)
    assert not time.step(idle=True)
    assert not time.step(idle=True)
    assert student.steps == 1
    assert not StudyTime(None).step(idle=True)


@pytest.mark.parametrize("share_kept", [0.8, 0.55])
@pytest.mark.parametrize("matchness", [0.1, 0.4, 0.65])
def test_a_layer_skipped_target_that_does_not_pay_is_turned_down(share_kept: float, matchness: float) -> None:
    """Each pass of such a drafter costs a good part of the step that it is to save."""
    passes = 4
    machine = Machine(CPU, draft_s=passes * share_kept * CPU.at(1))
    texts = [Text([matchness] * passes, [matchness] * passes)]
    plain = fixed(machine, texts, 4000, 0)
    speed, _ = governed(machine, texts, 4000)
    assert speed >= 0.97 * plain


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Rank:
    folder = save_tiny_llama(tmp_path_factory.mktemp("target"), layers=1)
    return build_rank(folder, "float32", num_slots=4, capacity=LENGTH, scratch=80, threads=1)


def test_an_engine_without_requests_lets_its_drafter_learn_and_answers_meanwhile(rank: Rank) -> None:
    async def scenario() -> None:
        student = Student()
        rig = Rig(rank, student, None, {})
        await rig.wait_until(lambda: student.steps > 10)
        assert len(await rig.tokens(ask("a"))) == 12
        before = student.steps
        await rig.wait_until(lambda: student.steps > before + 10)
        student.lessons = student.steps
        assert len(await rig.tokens(ask("b"))) == 12
        rig.engine.close()

    run(scenario())

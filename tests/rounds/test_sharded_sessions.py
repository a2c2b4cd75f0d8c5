"""Whole sessions on a tensor-parallel target: the tokens of one rank, with every drafter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exactness_rig import FLAT, GREEDY, SAMPLED, NoText, Rig, outputs, requests, stages
from thread_crew import ThreadCrew
from tiny import save_tiny_llama

from cluster.core.errors import ConfigError
from cluster.core.types import SamplingParams
from cluster.engine.tensor_parallel import ShardedRank, build_sharded_rank
from cluster.engine.verifier import Verifier
from cluster.rounds.detokenize import TextStream
from cluster.rounds.scheduler import Scheduler
from cluster.rounds.session import Limits, Session

# Uneven shares of the MLP and, over three ranks, of the vocabulary; one KV head for three ranks.
SHAPES = {
    2: {"intermediate_size": 95},
    3: {"intermediate_size": 95, "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 1},
}
COUNT = 5


class ShardedRig(Rig):
    """The rig of the exactness tests on several ranks."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.dtype = folder, "float64"
        self.rank: ShardedRank = build_sharded_rank(
            folder, self.dtype, size, ThreadCrew, num_slots=8, capacity=160, scratch=80, threads=1
        )
        self.limits = Limits(160, frozenset({1}))
        self.slots: dict[str, int] = {}


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3])
def rigs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, ShardedRig]]:
    """One rank and several, over the same weights."""
    threads = torch.get_num_threads()
    folder = save_tiny_llama(tmp_path_factory.mktemp("target"), **SHAPES[request.param])
    several = ShardedRig(folder, request.param)
    yield Rig(folder, "float64"), several
    several.rank.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(rigs: tuple[Rig, ShardedRig]) -> dict[SamplingParams, dict[str, list[int]]]:
    return {params: outputs(rigs[0].run(requests(params, COUNT))) for params in (GREEDY, SAMPLED)}


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["none", "sssd", "draft_model", "swift", "staged", "staged_swift"])
def test_every_drafter_gives_one_ranks_tokens(
    rigs: tuple[Rig, ShardedRig],
    draft_folder: Path,
    expected: dict[SamplingParams, dict[str, list[int]]],
    name: str,
    params: SamplingParams,
) -> None:
    rig = rigs[1]
    local = None if name == "none" else rig.drafter(stages(draft_folder, rig.dtype)[name])
    sessions = rig.run(requests(params, COUNT), local)
    assert outputs(sessions) == expected[params]
    if name not in ("none", "sssd"):
        assert sum(session.stats.drafted for session in sessions.values()) > 0


def test_a_search_for_sub_layers_to_skip_is_refused_on_several_ranks(
    rigs: tuple[Rig, ShardedRig], draft_folder: Path
) -> None:
    with pytest.raises(ConfigError, match="found:COUNT"):
        rigs[1].drafter(stages(draft_folder, rigs[1].dtype)["swift_search"])


def test_prefixes_are_taken_over_and_sessions_preempted_on_every_rank(
    rigs: tuple[Rig, ShardedRig], expected: dict[SamplingParams, dict[str, list[int]]]
) -> None:
    rig = rigs[1]
    rig.run(requests(SAMPLED, COUNT))
    again = rig.run(requests(SAMPLED, COUNT), kv_slots=8)
    assert outputs(again) == expected[SAMPLED]
    assert preempted_outputs(rig) == expected[SAMPLED]


def preempted_outputs(rig: Rig) -> dict[str, list[int]]:
    """The same requests, each of them losing its slot once in mid-generation."""
    scheduler = Scheduler(rig.config(), Verifier(rig.rank), FLAT, None, None, rig.slots)
    sessions = {r.request_id: Session(r, rig.limits, TextStream(NoText())) for r in requests(SAMPLED, COUNT)}
    for session in sessions.values():
        scheduler.submit(session)
    waiting = set(sessions)
    while not scheduler.idle:
        scheduler.step()
        for name in sorted(waiting):
            session = sessions[name]
            if session.base - session.prompt_len > 4 + len(waiting) and session.finish_reason is None:
                waiting.remove(name)
                scheduler.preempt(session)
    assert not waiting
    return outputs(sessions)

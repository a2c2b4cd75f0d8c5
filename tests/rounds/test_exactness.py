"""Output is a function of weights, prompt, parameters and seed: token identity whatever the drafters do.

Everything is compared with the same engine's plain decoding. fp64 runs on the torch kernels, fp32 and bf16 on the
native ones where a compiler is there; in each of them the identity is bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from exactness_rig import GREEDY, PENALISED, SAMPLED, Rig, outputs, plain, requests, stages
from fakes import (
    MALFORMED,
    InProcessTransport,
    ScriptedDrafter,
    always_wrong,
    duplicate_children,
    empty,
    malformed,
    oracle,
    over_deep,
)
from tiny import VOCAB

from cluster.core.types import GenerateRequest, SamplingParams
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.pipeline import Pipeline
from drafters import TargetFacts, create
from drafters.swift import SwiftDrafter

EVERY_DRAFTER = (
    *("sssd", "draft_model", "swift", "swift_search", "s3d", "mlp_speculator"),
    *("staged", "staged_swift", "staged_mlp"),
)


@pytest.fixture(scope="module")
def expected(rig: Rig) -> dict[SamplingParams, dict[str, list[int]]]:
    return {params: plain(rig, params) for params in (GREEDY, SAMPLED, PENALISED)}


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
@pytest.mark.parametrize("name", EVERY_DRAFTER)
def test_every_drafter_gives_plain_decodings_tokens(
    rig: Rig,
    draft_folder: Path,
    expected: dict[SamplingParams, dict[str, list[int]]],
    name: str,
    params: SamplingParams,
) -> None:
    sessions = rig.run(requests(params), rig.drafter(stages(draft_folder, rig.dtype)[name]))
    assert outputs(sessions) == expected[params]
    if name != "sssd":
        assert sum(session.stats.drafted for session in sessions.values()) > 0


def test_a_search_for_better_sets_changes_which_is_used_and_no_token(
    rig: Rig, draft_folder: Path, expected: dict[SamplingParams, dict[str, list[int]]]
) -> None:
    drafter = rig.drafter(stages(draft_folder, rig.dtype)["swift_search"])
    assert isinstance(drafter, SwiftDrafter)
    assert drafter.learner is not None
    search = drafter.learner.search
    used = set()
    for params in (GREEDY, SAMPLED, GREEDY):
        search._adopt(next(skip for skip in map(frozenset, ([2, 3], [4, 5], [2, 5])) if skip not in used))
        sessions = rig.run(requests(params), drafter)
        used.add(drafter.skip)
        assert outputs(sessions) == expected[params]
    assert len(used) > 1
    assert search.trials > 0


ADVERSARIES = {
    "always wrong": always_wrong(VOCAB),
    "empty": empty,
    "duplicate children": duplicate_children,
    "over-deep": over_deep,
} | {f"malformed {kind}": malformed(kind) for kind in MALFORMED}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_drafters_change_nothing(
    rig: Rig, expected: dict[SamplingParams, dict[str, list[int]]], name: str
) -> None:
    for params in (GREEDY, SAMPLED):
        sessions = rig.run(requests(params), ScriptedDrafter(ADVERSARIES[name]))
        assert outputs(sessions) == expected[params]


def test_a_perfect_drafter_is_accepted_whole(rig: Rig, expected: dict[SamplingParams, dict[str, list[int]]]) -> None:
    for params in (GREEDY, SAMPLED, PENALISED):
        truth = {r.prompt_token_ids: expected[params][r.request_id] for r in requests(params)}
        sessions = rig.run(requests(params, 1), ScriptedDrafter(oracle(truth)))
        assert outputs(sessions)["r0"] == expected[params]["r0"]
        assert sessions["r0"].stats.mean_accepted_length > 6


@pytest.mark.parametrize("concurrency", [1, 3, 8])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_neither_batching_nor_prefill_chunks_change_a_token(
    rig: Rig, expected: dict[SamplingParams, dict[str, list[int]]], concurrency: int, chunk: int
) -> None:
    for params in (GREEDY, SAMPLED):
        every = requests(params)
        found: dict[str, list[int]] = {}
        for at in range(0, len(every), concurrency):
            local = ScriptedDrafter(always_wrong(VOCAB))
            found |= outputs(rig.run(every[at : at + concurrency], local, prefill_chunk=chunk, max_rows=32))
        assert found == expected[params]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
def test_resuming_anywhere_continues_identically(
    rig: Rig, expected: dict[SamplingParams, dict[str, list[int]]], params: SamplingParams
) -> None:
    first = requests(params)[0]
    whole = expected[params][first.request_id]
    resumed = [
        GenerateRequest(f"r{at}", first.prompt_token_ids, params, tuple(whole[:at]), epoch=at % 2)
        for at in range(len(whole))
    ]
    for output in outputs(rig.run(resumed)).values():
        assert output == whole


def test_speculation_switched_off_per_request_drafts_nothing(
    rig: Rig, expected: dict[SamplingParams, dict[str, list[int]]]
) -> None:
    local = ScriptedDrafter(always_wrong(VOCAB))
    sessions = rig.run(requests(GREEDY, enabled=False), local)
    assert outputs(sessions) == expected[GREEDY]
    assert all(session.stats.drafted == 0 for session in sessions.values())
    sessions = rig.run(requests(GREEDY, max_nodes=2), local)
    assert all(session.stats.drafted <= 2 * session.stats.rounds for session in sessions.values())


@pytest.mark.parametrize("fault", ["none", "drop", "late", "duplicate", "dead", "hung"])
def test_remote_stages_under_every_transport_fault(
    rig: Rig, draft_folder: Path, expected: dict[SamplingParams, dict[str, list[int]]], fault: str
) -> None:
    made = stages(draft_folder, rig.dtype)
    facts = TargetFacts(VOCAB, 160, rig.folder)
    workers = {
        "small": DraftWorker("small", create(made["sssd"], target=facts)),
        "medium": DraftWorker("medium", create(made["draft_model"], target=facts)),
    }
    transport = InProcessTransport(workers)
    transport.drop = 0.4 if fault == "drop" else 0.0
    transport.duplicate = 1.0 if fault == "duplicate" else 0.0
    transport.delay_s = (0.0, 0.06) if fault in ("late", "duplicate") else (0.0, 0.0)
    transport.dead = {"medium"} if fault == "dead" else set()
    transport.hung = {"medium"} if fault == "hung" else set()
    pipeline = Pipeline(transport, ("small", "medium"), VOCAB, 12)
    # Where nothing is wrong no answer may be late, however busy the machine: the test asks for guesses then.
    wait = 10_000 if fault == "none" else 30
    for params in (GREEDY, SAMPLED):
        sessions = rig.run(requests(params), None, pipeline, draft_deadline_min_ms=wait, draft_deadline_max_ms=wait)
        assert outputs(sessions) == expected[params]
        transport.join()
    if fault == "none":
        assert sum(session.stats.drafted for session in sessions.values()) > 0
    assert pipeline.num_sessions == 0
    assert [worker.num_sessions for worker in workers.values()] == [0, 0]

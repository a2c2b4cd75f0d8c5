"""Tensor-parallel targets and drafters as Serve deploys them: placed together, one rank's tokens, replaced whole when a
rank dies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from tiny import VOCAB, save_tiny_llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cluster.core.config import DraftersConfig, ServiceConfig, StageConfig
from cluster.core.token_tree import TokenTree
from cluster.core.types import Commit, GenerateRequest, SamplingParams, TreeKey, digest_of
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.messages import DraftAsk, DraftReply, SessionStart, pack, unpack
from drafters import TargetFacts, create
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

APP = "ranks"
PROMPT = (5, 6, 7, 8, 5, 6)
TOKENS = 24


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"))
    words = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return {
        "model": {"source": str(folder), "name": "tiny", "dtype": "float64", "threads": 1},
        "engine": {"max_model_len": 128, "kv_slots": 2, "max_rows": 16, "max_nodes": 6},
    }


@pytest.fixture(scope="module")
def expected(arguments: dict[str, Any]) -> list[int]:
    """What one rank says, in this process."""
    from cluster.assemble import build_engine

    engine = build_engine(ServiceConfig.model_validate(arguments))
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=TOKENS, ignore_eos=True)

    async def generate() -> list[int]:
        async with aclosing(cast(Any, engine.generate(GenerateRequest("r", PROMPT, params)))) as items:
            return [token async for item in items for token in item.token_ids]

    try:
        return asyncio.run(generate())
    finally:
        engine.close()


@pytest.fixture(scope="module")
def service(ray_cluster, arguments: dict[str, Any]) -> Iterator[generation_pb2_grpc.GenerationStub]:  # type: ignore[no-untyped-def]
    from ray import serve

    from deployments.app import build_service

    sharded = {**arguments, "model": {**arguments["model"], "tensor_parallel_size": 2}, "replay_timeout_s": 120.0}
    options = {"num_cpus": 0.2, "resources": {}}
    serve.run(build_service({**sharded, "target": {"ray_actor_options": options}}), name=APP, route_prefix="/ranks")
    with grpc.insecure_channel(f"127.0.0.1:{ray_cluster.grpc_port}") as channel:
        yield generation_pb2_grpc.GenerationStub(channel)
    serve.delete(APP)


def tokens(service: generation_pb2_grpc.GenerationStub) -> list[int]:
    params = pb.SamplingParams(temperature=0.7, seed=3, max_tokens=TOKENS, ignore_eos=True)
    request = pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=PROMPT), sampling_params=params)
    answer = service.Generate(request, metadata=(("application", APP),), timeout=200, wait_for_ready=True)
    return list(answer.token_ids)


def pids(service: generation_pb2_grpc.GenerationStub) -> dict[str, int]:
    """The target's processes; none while no target serves."""
    try:
        load = service.GetLoad(pb.GetLoadRequest(), metadata=(("application", APP),), timeout=30)
    except grpc.RpcError:
        return {}
    return dict(load.replicas[0].worker_pids) if load.replicas else {}


def test_two_ranks_give_one_ranks_tokens_and_a_killed_rank_is_replaced_with_its_target(
    service: generation_pb2_grpc.GenerationStub, expected: list[int]
) -> None:
    import ray

    assert tokens(service) == expected
    before = pids(service)
    assert set(before) == {"target", "rank 1"}
    groups = [group for group in ray.util.placement_group_table().values() if group["state"] == "CREATED"]
    assert [(group["strategy"], len(group["bundles"])) for group in groups] == [("STRICT_PACK", 2)]

    os.kill(before["rank 1"], signal.SIGKILL)
    deadline = time.monotonic() + 200
    while not (after := pids(service)) or after["target"] == before["target"]:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert tokens(service) == expected


def asked() -> list[DraftAsk]:
    key = TreeKey("session", 0, len(PROMPT), digest_of(PROMPT))
    return [DraftAsk(Commit(key, key.base, ()), 8, 4, SessionStart(PROMPT, len(PROMPT), SamplingParams()))]


def rank_processes() -> set[int]:
    found = set[int]()
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if (entry / "cmdline").read_bytes().startswith(b"ray::RankActor"):
                found.add(int(entry.name))
    return found


def test_a_drafter_of_two_ranks_drafts_as_one_and_begins_anew_when_a_rank_dies(
    ray_cluster,  # type: ignore[no-untyped-def]
    arguments: dict[str, Any],
) -> None:
    from ray import serve
    from ray.exceptions import RayError

    from deployments.app import build_drafters

    model = {**arguments["model"], "name": "draft"}
    stage = {"name": "medium", "drafter": "draft_model", "model": model, "max_sessions": 2}
    facts = TargetFacts(VOCAB, 128, Path(model["source"]), "float64")
    alone = DraftWorker("medium", create(StageConfig.model_validate(stage), target=facts))
    expected = alone.draft("v", asked()).trees["session"]

    before = rank_processes()
    sharded = {**stage, "model": {**model, "tensor_parallel_size": 2}, "actor_options": {"num_cpus": 0.2}}
    config = {"target_model": model, "max_model_len": 128, "stages": [sharded]}
    assert DraftersConfig.model_validate(config).stages[0].num_ranks == 2
    serve.run(build_drafters(config), name="wide", route_prefix=None)
    try:
        leases = serve.get_deployment_handle("Draft-medium", "wide").options(stream=True).open.remote("v", "session")
        worker = next(iter(leases)).worker

        def tree() -> TokenTree | None:
            with suppress(RayError):
                reply: DraftReply = unpack(serve_get(worker.draft.remote("v", pack(asked()))))
                return reply.trees.get("session")
            return None

        def serve_get(ref: Any) -> bytes:
            import ray

            return cast(bytes, ray.get(ref, timeout=60))

        found = tree()
        assert found is not None
        assert (found.tokens.tolist(), found.parents.tolist()) == (expected.tokens.tolist(), expected.parents.tolist())
        (rank,) = rank_processes() - before
        os.kill(rank, signal.SIGKILL)
        deadline = time.monotonic() + 120
        while (again := tree()) is None or not rank_processes() - before - {rank}:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert again.tokens.tolist() == expected.tokens.tolist()
        leases.cancel()
    finally:
        serve.delete("wide")
    deadline = time.monotonic() + 60
    while rank_processes() - before:
        assert time.monotonic() < deadline, "a rank outlived its worker"
        time.sleep(0.5)

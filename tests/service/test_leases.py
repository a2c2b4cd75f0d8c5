"""Leases and draft calls on a real Ray: what hangs, dies or is not there costs its own sessions' trees only."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from service_rig import MODEL

from cluster.core.types import Commit, SamplingParams, TreeKey, digest_of
from cluster.leases import RayDraftTransport, _Call, _deliver_in_turn
from cluster.rounds.messages import DraftAsk, DraftReply, SessionStart, WorkerFacts, pack, unpack
from cluster.rounds.pipeline import ChainAsk

pytestmark = [pytest.mark.weights, pytest.mark.cluster]

APP = "lease-drafters"
VERIFIER = "test"
PROMPT = (5, 6, 7, 5, 6, 7, 5, 6)
STAGES = ("small", "medium")


def eventually(holds: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def deploy() -> None:
    from ray import serve

    from deployments.app import build_drafters

    stages = [{"name": "small", "drafter": "sssd"}]
    serve.run(build_drafters({"target_model": MODEL, "stages": stages}), name=APP, route_prefix=None)


def sessions() -> int:
    from ray import serve

    return int(serve.get_app_handle(APP).sessions.remote().result(timeout_s=20)["small"])


class Answers:
    """What a transport's callbacks were told."""

    def __init__(self) -> None:
        self.replies: list[DraftReply] = []
        self.failures: list[tuple[str, tuple[str, ...]]] = []
        self._arrived = threading.Condition()

    def deliver(self, worker: Hashable, reply: DraftReply) -> None:
        with self._arrived:
            self.replies.append(reply)
            self._arrived.notify_all()

    def fail(self, stage: str, worker: Hashable, session_ids: Any) -> None:
        with self._arrived:
            self.failures.append((stage, tuple(session_ids)))
            self._arrived.notify_all()

    def tree_of(self, session_id: str, stage: str) -> bool:
        return any(session_id in reply.trees and reply.reports[-1].stage == stage for reply in self.replies)

    def wait_for(self, holds: Callable[[], bool], timeout_s: float = 30.0) -> bool:
        with self._arrived:
            return self._arrived.wait_for(holds, timeout_s)


def ask(session_id: str, stages: Sequence[str] = STAGES) -> ChainAsk:
    key = TreeKey(session_id, 0, len(PROMPT), digest_of(PROMPT))
    start = SessionStart(PROMPT, len(PROMPT), SamplingParams())
    return ChainAsk(session_id, {stage: DraftAsk(Commit(key, key.base, ()), 8, 4, start) for stage in stages})


@pytest.fixture(params=[False, True], ids=["sent at once", "in the background"])
def transport(ray_cluster, request: pytest.FixtureRequest) -> Iterator[RayDraftTransport]:  # type: ignore[no-untyped-def]
    from cluster.core.types import tokenizer_hash
    from cluster.engine.weights import load_tokenizer, resolve_model

    vocab = load_tokenizer(resolve_model(MODEL["source"])).get_vocab()
    made = RayDraftTransport(VERIFIER, APP, STAGES, tokenizer_hash(vocab), in_background=request.param)
    yield made
    made.stop()
    assert not made._thread.is_alive()
    assert not made._workers


def start_workers(stages: Sequence[str], **options: Any) -> list[tuple[Any, WorkerFacts]]:
    from cluster.core.config import DraftersConfig, ModelConfig, StageConfig
    from cluster.launch import start_draft_worker

    config = DraftersConfig(target_model=ModelConfig.model_validate(MODEL))
    with ThreadPoolExecutor() as pool:
        return list(
            pool.map(
                lambda name: start_draft_worker(StageConfig(name=name, drafter="sssd", options=options), config), stages
            )
        )


def test_a_worker_that_hangs_or_dies_holds_up_no_other_sessions_calls(transport: RayDraftTransport) -> None:
    import ray

    (medium, _), (hung, facts), (sound, _) = workers = start_workers(["medium", "small", "small"])
    for session_id, small in (("stuck", hung), ("free", sound)):
        transport._workers |= {(session_id, "small"): small, (session_id, "medium"): medium}
    answers = Answers()
    os.kill(facts.pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            transport.draft([ask("stuck"), ask("free")], answers.deliver, answers.fail)
        assert answers.wait_for(lambda: answers.tree_of("free", "medium"))
        assert answers.replies[0].reports[-1].stage == "small"  # each stage answers by itself
        assert not any("stuck" in reply.trees for reply in answers.replies)
    finally:
        os.kill(facts.pid, signal.SIGCONT)
    assert answers.wait_for(lambda: answers.tree_of("stuck", "medium"))
    assert answers.failures == []
    transport.draft([ask("no lease")], answers.deliver, answers.fail)
    assert answers.wait_for(lambda: answers.failures == [("small", ("no lease",))])
    ray.kill(hung)  # takes effect in its own time

    def lost() -> bool:
        transport.draft([ask("stuck")], answers.deliver, answers.fail)
        return answers.wait_for(lambda: len(answers.failures) > 1, 1.0)

    assert eventually(lost)
    assert set(answers.failures[1:]) == {("small", ("stuck",))}
    transport._workers.clear()
    for worker, _ in workers[::2]:
        ray.kill(worker)


def test_a_call_that_failed_leaves_nothing_for_the_collector() -> None:
    read: list[Future[bytes]] = []

    class Answer:
        def future(self) -> Future[bytes]:
            read.append(Future())
            return read[0]

    answers, answer = Answers(), Answer()
    kept = weakref.ref(answer)

    def fail(stage: str, worker: Hashable, error: BaseException) -> None:
        answers.fail(stage, worker, [])

    gc.disable()
    try:
        _deliver_in_turn(deque([_Call("small", None, answer)]), answers.deliver, fail)
        read.pop().set_exception(RuntimeError("the worker died"))
        assert answers.failures == [("small", ())]
        del answer
        assert kept() is None
    finally:
        gc.enable()


def test_a_draft_actor_remembers_nothing_of_asks_that_are_answered() -> None:
    from cluster.core.config import DraftersConfig, ModelConfig, StageConfig
    from cluster.launch import DraftActor

    async def work() -> None:
        config = DraftersConfig(target_model=ModelConfig.model_validate(MODEL))
        actor = DraftActor(StageConfig(name="small", drafter="sssd"), config)
        asks = [ask(f"s{at}").asks["small"] for at in range(10)]
        replies = await asyncio.gather(*(actor.draft(VERIFIER, pack([each])) for each in asks))
        assert all(unpack(reply).trees for reply in replies)
        await actor.check()
        assert actor._newest == {}
        for at in range(10):
            await actor.release(VERIFIER, f"s{at}")
        assert await actor.num_sessions() == 0

    asyncio.run(work())


def test_a_session_whose_end_was_lost_is_freed_although_nobody_asks_any_more() -> None:
    from cluster.core.config import DraftersConfig, ModelConfig, StageConfig
    from cluster.launch import DraftActor

    async def work() -> None:
        config = DraftersConfig(target_model=ModelConfig.model_validate(MODEL))
        actor = DraftActor(StageConfig(name="small", drafter="sssd", lease_ttl_s=0.1), config)
        await actor.draft(VERIFIER, pack([ask("orphan").asks["small"]]))
        assert await actor.num_sessions() == 1
        for _ in range(100):
            await actor.check()
            await asyncio.sleep(0.05)
            if await actor.num_sessions() == 0:
                return
        raise AssertionError("still held")

    asyncio.run(work())


@pytest.mark.slow
@pytest.mark.parametrize("transport", [False], indirect=True)
def test_leases_come_and_go_with_applications_workers_and_sessions(transport: RayDraftTransport) -> None:
    import ray
    from ray import serve

    answers = Answers()

    def drafted() -> bool:
        answers.replies.clear()
        transport.draft([ask("s", ("small",))], answers.deliver, answers.fail)
        return answers.wait_for(lambda: answers.tree_of("s", "small"), 1.0)

    transport.open("s", ["small"])  # nothing is deployed yet
    assert transport.leases()["small"] == 0
    deploy()
    assert eventually(drafted)
    assert sessions() == 1

    gone = transport._workers["s", "small"]
    ray.kill(gone, no_restart=True)  # for good: Serve must replace the replica whose worker it was
    assert eventually(lambda: transport._workers.get(("s", "small"), gone) != gone)
    assert eventually(drafted)

    serve.delete(APP)
    assert eventually(lambda: transport.leases()["small"] == 0)
    deploy()
    assert eventually(drafted)
    transport.close("s")
    assert eventually(lambda: transport.leases()["small"] == 0)
    assert eventually(lambda: sessions() == 0)
    assert transport._tasks == {}
    serve.delete(APP)


def test_a_drafter_that_cannot_start_says_so(ray_cluster) -> None:  # type: ignore[no-untyped-def]
    from ray.exceptions import RayActorError

    with pytest.raises(RayActorError, match="no_such_option"):
        start_workers(["small"], no_such_option=1)

"""The service under test: how it is laid out (``Layout``), and a running one with hands on its processes (``Rig``)."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.faults import deploy
from benchmarks.faults.head import RayHead, wait_until
from benchmarks.faults.liar import SWITCH
from benchmarks.faults.tiny_model import save_tiny_model
from deployments.client import open_channel
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

READY_LIMIT_S = 300.0
CALL_LIMIT_S = 10.0
STAGES = ("small", "medium")
STEP_MS = 10.0
SLOW_STEP_MS = 40.0  # where drafters must be worth their while
DEADLINE_MS = 500.0
"""How long a round waits for trees at most: ``EngineConfig.draft_deadline_max_ms``."""
KV_SLOTS = 8
HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"


@dataclass(frozen=True, slots=True)
class Layout:
    """What a trial's service consists of. ``drafters_apart``: on a host of their own, behind a network link.
    ``governed``: drafters are asked only while that is faster, not always."""

    targets: int = 1
    ranks: int = 1
    smalls: int = 1
    drafters_apart: bool = False
    liar: bool = False
    governed: bool = False


def service_arguments(layout: Layout, model: dict[str, Any]) -> dict[str, Any]:
    """``emulated_step_ms`` makes a stream last long enough for something to happen to it."""
    here = {"resources": {"service": 0.01}}
    return {
        "model": {**model, "tensor_parallel_size": layout.ranks},
        "engine": {
            "max_model_len": 256,
            "kv_slots": KV_SLOTS,
            "max_nodes": 8,
            "governor": "auto" if layout.governed else "always",
            "emulated_step_ms": SLOW_STEP_MS if layout.governed else STEP_MS,
            "draft_deadline_steps": 100.0,
            "draft_deadline_max_ms": DEADLINE_MS,
        },
        "local_drafter": None,
        "remote_stages": list(STAGES),
        "drafters_app": deploy.DRAFTERS,
        "replay_timeout_s": 300.0,
        "target": {"num_replicas": layout.targets, "ray_actor_options": {"num_cpus": 0.1, **here}},
        "ingress": {"ray_actor_options": here},
    }


def drafters_arguments(layout: Layout, model: dict[str, Any], lies: Path) -> dict[str, Any]:
    """Medium has the target's own weights: a random model is guessed by nothing else."""
    place = {"resources": {"draft": 0.01}} if layout.drafters_apart else {}
    hook = {HOOK: "benchmarks.faults.liar.install", SWITCH: str(lies)} if layout.liar else {}
    worker = {"num_cpus": 0.1, **place, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1", **hook}}}
    replica = {"num_cpus": 0.0, **place, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    small: dict[str, Any] = {
        "name": "small",
        "drafter": "sssd",
        "actor_options": worker,
        "deployment": {"num_replicas": layout.smalls, "ray_actor_options": replica},
    }
    medium = {
        "name": "medium",
        "drafter": "draft_model",
        "options": {"passes": 3},
        "actor_options": worker,
        "deployment": {"ray_actor_options": replica},
    }
    return {"target_model": model, "max_model_len": 256, "stages": [small, medium]}


class Rig:
    """A running service and its processes. ``pid`` and friends name the real ones; nothing here is emulated."""

    def __init__(self, layout: Layout, head: RayHead, folder: Path) -> None:
        self.layout = layout
        self.head = head
        self.lies = folder / "lies"
        self.address = f"127.0.0.1:{head.grpc_port}"
        self._model = {"source": str(folder / "model"), "name": "tiny", "dtype": "float32", "threads": 1}
        self._channel = open_channel(self.address)
        self.stub = generation_pb2_grpc.GenerationStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        if not (folder / "model").exists():
            save_tiny_model(folder / "model")

    def deploy(self) -> None:
        """Returns once both stages' trees are accepted."""
        plan = {
            "ports": [self.head.http_port, self.head.grpc_port],
            "service": service_arguments(self.layout, self._model),
            "drafters": drafters_arguments(self.layout, self._model, self.lies),
        }
        self.head.call("benchmarks.faults.deploy", json.dumps(plan))
        self.wait_until_whole()

    def close(self) -> None:
        self._channel.close()

    # --- what is there

    def loads(self) -> list[pb.ReplicaLoad]:
        """Of every target that answers; none where the doors do not."""
        with contextlib.suppress(grpc.RpcError):
            return list(self.stub.GetLoad(pb.GetLoadRequest(), timeout=CALL_LIMIT_S).replicas)
        return []

    def pid(self, part: str) -> int:
        """Process id of ``target``, ``rank 1``, ``small`` or ``medium``. Raises ``LookupError`` where it is unknown."""
        for load in self.loads():
            if part in load.worker_pids:
                return load.worker_pids[part]
        raise LookupError(f"no target knows a process called {part!r}")

    def targets(self) -> set[int]:
        return {load.worker_pids["target"] for load in self.loads()}

    def actor(self, title: str) -> int:
        """Process id of one of Serve's own actors. Raises ``LookupError`` where there is none."""
        pids = self.head.named(title)
        if not pids:
            raise LookupError(f"no process is called {title}")
        return pids[0]

    def serving(self) -> bool:
        with contextlib.suppress(grpc.RpcError):
            answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=CALL_LIMIT_S)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        return False

    # --- what works

    def speculates(self, besides: int = 0) -> Callable[[], bool]:
        """A condition: from now on every stage has answered from a process other than ``besides``, and the target has
        accepted guesses."""
        before = {load.replica: sum(load.stats.accepted.values()) for load in self.loads()}

        def holds() -> bool:
            return any(
                set(STAGES) <= set(load.worker_pids)
                and besides not in load.worker_pids.values()
                and sum(load.stats.accepted.values()) > before.get(load.replica, 0)
                for load in self.loads()
            )

        return holds

    def drafts(self, stage: str, besides: int = 0) -> Callable[[], bool]:
        """A condition: from now on nodes of that stage, from a process other than ``besides``, are verified."""
        before: dict[str, int] = {}

        def holds() -> bool:
            for load in self.loads():
                if load.worker_pids.get(stage, besides) == besides:
                    continue
                seen = before.setdefault(load.replica, load.stats.drafted[stage])
                if load.stats.drafted[stage] > seen:
                    return True
            return False

        return holds

    def idle(self) -> bool:
        """Nothing runs, waits, holds a KV slot or a lease on any target."""
        loads = self.loads()
        busy = [
            load.running or load.waiting or load.kv_slots_used or any(load.drafter_sessions.values()) for load in loads
        ]
        return len(loads) == self.layout.targets and not any(busy)

    def wait_until_whole(self) -> None:
        """Every part answers. Raises ``TimeoutError`` where one does not."""
        wait_until(self.serving, READY_LIMIT_S, "the service calls itself healthy", 0.3)
        wait_until(lambda: len(self.loads()) == self.layout.targets, READY_LIMIT_S, "all targets answer", 0.3)
        holds = self.drafts("medium")
        deadline = time.monotonic() + READY_LIMIT_S
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {READY_LIMIT_S:.0f} s: the medium stage's trees are verified")
            with contextlib.suppress(grpc.RpcError):
                self.stub.Generate(request(0, 64), timeout=60.0)


def request(number: int, max_tokens: int) -> pb.GenerateRequest:
    """Request ``number``: even ones greedy, odd ones sampled with a seed; prompts differ, and repeat themselves."""
    prompt = [2 + (number * 7 + at * at) % 200 for at in range(6)] * 2
    params = pb.SamplingParams(
        temperature=0.8 if number % 2 else 0.0, top_p=0.95, seed=number, max_tokens=max_tokens, ignore_eos=True
    )
    return pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=prompt), sampling_params=params)


@contextlib.contextmanager
def running(layout: Layout, folder: Path) -> Iterator[Rig]:
    """A service of that layout on a cluster of its own. ``folder`` keeps the model between calls."""
    with contextlib.ExitStack() as stack:
        head: RayHead
        if layout.drafters_apart:
            from benchmarks.faults.link import draft_host

            head = stack.enter_context(draft_host())
        else:
            head = RayHead()
            stack.callback(head.close)
        rig = Rig(layout, head, folder)
        stack.callback(rig.close)
        rig.deploy()
        yield rig

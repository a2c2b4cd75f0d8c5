"""The deployed service through its gRPC door, streaming: a running one at ``address``, or one of the worker's own.

Its own one has free ports and a state folder of its own, so that a service of this folder's `make run` is left alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
import yaml

from benchmarks.engines.base import Answer, Ask, Defaults, Prompt, Setup, Unavailable, own_cores, session_members
from benchmarks.ports import free_ports
from deployments import up
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

READY_TIMEOUT_S = 30.0


class Loaded(Defaults):
    def __init__(self, setup: Setup) -> None:
        self._own = OwnCluster(Path(setup.config)) if setup.address is None else None
        address = self._own.address if self._own else setup.address
        self._channel = grpc.insecure_channel(address)
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)
        try:
            info = self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=READY_TIMEOUT_S, wait_for_ready=True)
        except grpc.RpcError as error:
            self.close()
            raise Unavailable(f"no service at {address}: {error.details()}") from error
        self.versions = {"ray": importlib.metadata.version("ray"), "model": info.model, "kernels": info.kernels}

    def generate(self, ask: Ask) -> list[Answer]:
        """As many client threads as sessions; each sends its next prompt when its answer is there."""
        waiting: queue.SimpleQueue[Prompt] = queue.SimpleQueue()
        for prompt in ask.prompts:
            waiting.put(prompt)
        answers: list[Answer] = []
        failures: list[grpc.RpcError] = []

        def client() -> None:
            while not failures:
                try:
                    answers.append(self._ask(waiting.get_nowait(), ask))
                except queue.Empty:
                    return
                except grpc.RpcError as error:
                    failures.append(error)

        clients = [threading.Thread(target=client) for _ in range(min(ask.concurrency, len(ask.prompts)))]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        if failures:
            raise Unavailable(f"{failures[0].code().name}: {failures[0].details()}")
        return answers

    def _ask(self, prompt: Prompt, ask: Ask) -> Answer:
        request = pb.GenerateRequest(
            prompt_token_ids=pb.TokenIds(ids=prompt.token_ids),
            sampling_params=pb.SamplingParams(
                temperature=ask.temperature, top_p=1.0, seed=prompt.index, max_tokens=ask.max_tokens
            ),
            speculation=pb.Speculation(enabled=ask.engine != "service_plain"),
            cache_salt=ask.salt,
        )
        start, token_ids, rounds = time.perf_counter(), list[int](), 0
        for item in self._stub.GenerateStream(request):
            token_ids.extend(item.token_ids)
            rounds = item.speculation.rounds
        return Answer(prompt.index, tuple(token_ids), time.perf_counter() - start, rounds or None)

    def processes(self) -> list[int]:
        return self._own.processes() if self._own else []

    def close(self) -> None:
        self._channel.close()
        if self._own:
            self._own.stop()


class OwnCluster:
    """Ray and the applications of a Serve config file, on free ports, in a folder of its own.

    ``gcs``: where Ray is. ``address``: of the gRPC door, if there is one.
    """

    def __init__(self, config: Path) -> None:
        document = yaml.safe_load(config.read_text())
        for options, port in zip(("http_options", "grpc_options"), free_ports(2)):
            document[options]["port"] = port
        self.address = f"127.0.0.1:{document['grpc_options']['port']}"
        self._folder = Path(tempfile.mkdtemp(prefix="paceline-bench-"))
        file = self._folder / "service.yaml"
        file.write_text(yaml.safe_dump(document))
        os.chdir(self._folder)  # `deployments.up` keeps its state and logs below the current folder
        try:
            up.prepare(document)
            self.dashboard = up.start_ray()
            up.deploy(file, {application["name"] for application in document["applications"]}, self.dashboard)
            self.gcs = f"127.0.0.1:{json.loads(up.STATE.read_text())['port']}"
            if any(application["route_prefix"] for application in document["applications"]):
                up.wait_until_serving(self.address)
        except up.SetupError as error:
            self.stop()
            raise Unavailable(f"the service does not start: {error}") from error
        except BaseException:
            self.stop()
            raise

    def processes(self) -> list[int]:
        return session_members(json.loads(up.STATE.read_text())["pid"])

    def stop(self) -> None:
        up.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def environment(setup: Setup) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": str(len(own_cores()[: setup.threads]))}
    return threads | cluster_environment(Path(sys.executable).parent)


def cluster_environment(tools: Path) -> dict[str, str]:
    """``ray`` and ``serve`` are found in ``tools``. Ray reads its variables when it is imported."""
    path = os.pathsep.join([str(tools), os.environ.get("PATH", "")])
    return {**up.ONE_MACHINE_ENV, "PYTHONUNBUFFERED": "1", "PATH": path}

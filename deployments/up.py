"""`make run` and `make stop`: a Ray cluster of our own on this machine, the service on it, and one real request.

    python -m deployments.up [--config deployments/configs/cpu.yaml] [--prompt TEXT]
    python -m deployments.up --stop

Stops only what it started: the head's process id is kept in `.run/`, and other Ray clusters are left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.core.config import ModelConfig
from cluster.core.errors import PacelineError
from cluster.core.types import STAGE_NAMES
from deployments import client
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

PROMPT = "Write a short poem about the sea. Then write the same poem again, word for word."
DOORS = ("http_options", "grpc_options")
STATE = Path(".run/state.json")
LOG = Path(".run/ray.log")
SERVE_LOGS = "/tmp/ray/session_latest/logs/serve/"  # of the Ray that was started last on this machine
START_TIMEOUT_S = 120.0
DEPLOY_TIMEOUT_S = 600.0
RAY_ENV = {
    # Ray's own ports listen on every interface: nobody without this user's token (~/.ray/auth_token) may use them.
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would run the engine at niceness 15: whatever else wants a core would take it.
    "RAY_worker_niceness": "0",
    # Who reserves no GPU is to see none: kernels are chosen by what is there.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "3",
    # Every streamed item and every draft is a call; Ray's record of calls would grow by tens of MB per 1,000 requests.
    "RAY_task_events_report_interval_ms": "0",
    # A message to the gRPC door is read whole before anybody looks at it; Serve would take 2 GiB.
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(8 * 2**20),
    # Replace a dead proxy or replica in seconds rather than tens of seconds.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # Let the autoscaler see load changes quickly.
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
ONE_MACHINE_ENV = {
    **RAY_ENV,
    # Ray's idle work takes a fifth of a core from an engine that has few: a third less so. `GET /metrics` is ours.
    "RAY_enable_metrics_collection": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("deployments/configs/cpu.yaml"))
    parser.add_argument("--prompt", default=PROMPT, help="what the demonstration asks")
    parser.add_argument("--stop", action="store_true", help="take down what this command started")
    args = parser.parse_args()
    os.environ.update(ONE_MACHINE_ENV)
    try:
        if args.stop:
            return stop()
        config = read(args.config)
        prepare(config)
        dashboard = start_ray([config[door]["port"] for door in DOORS])
        deploy(args.config, {application["name"] for application in config["applications"]}, dashboard)
        address = f"127.0.0.1:{config['grpc_options']['port']}"
        wait_until_serving(address)
        demonstrate(address, args.prompt, model_source(config))
        http = config["http_options"]
        print(f"\nThe service is up: http://{http['host']}:{http['port']}/v1 (OpenAI-style) and", end=" ")
        print(
            f"127.0.0.1:{config['grpc_options']['port']} (gRPC). `make stop` takes it down; logs are in {SERVE_LOGS}."
        )
    except (PacelineError, SetupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"error: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    return 0


def demonstrate(address: str, prompt: str, tokenizer: str) -> None:
    """One real request over gRPC, twice: through every drafting stage, then as the engine itself would choose."""
    ask = ["--address", address, "--prompt", prompt, "--stream", "--compare", "--max-tokens", "160"]
    ask += ["--tokenizer", tokenizer]
    colours = "never" if "NO_COLOR" in os.environ else "always"
    failed = 0
    print(f"\n> {prompt}")
    if stages := wake_stages(address):
        print(f"\nwith {' and '.join(stages)} asked in every round, whether it pays or not:", flush=True)
        failed |= client.main([*ask, "--stages", ",".join(stages), "--color", colours])
    print("\nguessing only where the engine measures that it pays:", flush=True)
    failed |= client.main([*ask, "--color", "never"])
    if failed:
        raise SetupError("the request failed: see above")


def wake_stages(address: str) -> list[str]:
    """Have every remote stage answer once and return them; one that nobody named of late stands at zero replicas."""
    ask = pb.GenerateRequest(prompt="one two three", sampling_params=pb.SamplingParams(max_tokens=64, ignore_eos=True))
    with grpc.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)

        def answers() -> Counter[str]:
            counts = Counter[str]()
            for replica in stub.GetLoad(pb.GetLoadRequest(), timeout=10.0).replicas:
                counts.update({stage: stats.answers for stage, stats in replica.stages.items()})
            return counts

        before, deadline = answers(), time.monotonic() + START_TIMEOUT_S
        stages = [stage for stage in STAGE_NAMES if stage in before]
        ask.speculation.stages.extend(stages)
        while any(answers()[stage] == before[stage] for stage in stages):
            if time.monotonic() > deadline:
                raise SetupError(f"{stages} do not answer after {START_TIMEOUT_S:.0f} s; logs are in {SERVE_LOGS}")
            stub.Generate(ask, timeout=60.0)
        return stages


def model_source(config: dict[str, Any]) -> str:
    """Where the target of a Serve config file comes from."""
    arguments = [application.get("args") or {} for application in config["applications"]]
    named = (part["model"].get("source") for part in arguments if isinstance(part.get("model"), dict))
    return next((source for source in named if source), ModelConfig().source)


class SetupError(Exception):
    """The cluster or the service did not come up; the message says what was seen and where to look."""


def prepare(config: dict[str, Any]) -> None:
    """Fetch weights and build kernels before any replica needs them, where their progress can be seen."""
    from cluster.engine.kernels import choose_kernels
    from cluster.engine.weights import resolve_model

    sources = {
        part["source"]: part.get("dtype", "bfloat16")
        for application in config["applications"]
        for part in (application.get("args") or {}).values()
        if isinstance(part, dict) and "source" in part
    }
    for source, dtype in sources.items():
        print(f"preparing {source}", flush=True)
        resolve_model(source, lambda line: print(f"  {line}", flush=True))
        print("preparing the CPU kernels (compiled once)", flush=True)
        print(f"  {choose_kernels('auto', dtype).name} kernels", flush=True)


def read(path: Path) -> dict[str, Any]:
    """A Serve config file. Raises ``SetupError`` for what is none, or has not all that is needed here."""
    try:
        config = yaml.safe_load(path.read_text())
        for door in DOORS:
            int(config[door]["port"])
        if not config["http_options"].get("host"):
            raise SetupError(
                f"{path} needs http_options.host: without one Serve listens on every interface; try 127.0.0.1"
            )
        [application["name"] for application in config["applications"]]
    except (OSError, yaml.YAMLError) as error:
        raise SetupError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        needed = ", ".join(f"{door}.port" for door in DOORS)
        raise SetupError(f"{path} needs applications with names, {needed}; missing or wrong: {error}") from None
    found: dict[str, Any] = config
    return found


def start_ray(doors: Sequence[int] = ()) -> str:
    """Start a head node, or find the one that an earlier call started. Returns the dashboard's address.

    Raises ``SetupError`` where another process listens on one of ``doors``: Serve would share the port with it.
    """
    if STATE.exists():
        state = json.loads(STATE.read_text())
        if state["pid"] in _processes(state):
            print(f"Ray is up already (process {state['pid']})")
            return str(state["dashboard"])
        stop()  # what a dead head left behind
    for door in doors:
        if not _is_free(door):
            raise SetupError(f"port {door} is in use by another process; set another one in a copy of the config file")
    STATE.parent.mkdir(exist_ok=True)
    _tool("ray", "get-auth-token", "--generate")
    port, dashboard_port = _free_port(6379), _free_port(8265)
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}", "--disable-usage-stats"]
    command += ["--include-log-monitor=False"]  # it reads every log to show it to drivers: there are none
    print(f"starting Ray on port {port} (log: {LOG})", flush=True)
    with open(LOG, "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    state = {"pid": process.pid, "born": _born(process.pid), "port": port, "dashboard": dashboard}
    STATE.write_text(json.dumps(state))
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            STATE.unlink()
            raise SetupError(f"`ray start` ended with {process.returncode}; see {LOG}")
        if applications(dashboard) is not None:
            return dashboard
        time.sleep(0.5)
    raise SetupError(f"Ray did not answer on {dashboard} within {START_TIMEOUT_S:.0f} s; see {LOG}")


def deploy(config: Path, names: set[str], dashboard: str) -> None:
    """`serve deploy`, then wait until the applications of these names run, showing where they stand."""
    _tool("serve", "deploy", str(config), "-a", dashboard)
    start, shown = time.monotonic(), ""
    while time.monotonic() - start < DEPLOY_TIMEOUT_S:
        found = applications(dashboard) or {}
        line = ", ".join(describe(name, state) for name, state in found.items())
        if line != shown:
            print(f"  {time.monotonic() - start:5.1f} s  {line}", flush=True)
            shown = line
        states = {state["status"] for state in found.values()}
        if states == {"RUNNING"} and names <= found.keys():
            return
        if "DEPLOY_FAILED" in states:
            messages = [state["message"] for state in found.values() if state["status"] == "DEPLOY_FAILED"]
            raise SetupError("deploying failed: " + "\n".join(messages))
        time.sleep(0.5)
    raise SetupError(f"not running after {DEPLOY_TIMEOUT_S:.0f} s: {shown}")


def wait_until_serving(address: str) -> None:
    """Wait for the door's own word: Serve calls an application running before its ingress has heard from a target."""
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(grpc.RpcError):
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=5)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(0.5)
    raise SetupError(f"{address} does not call itself healthy after {START_TIMEOUT_S:.0f} s; logs are in {SERVE_LOGS}")


def stop() -> int:
    """End the head node that ``start_ray`` started, and every process of its Unix session: Ray keeps them all in it."""
    if not STATE.exists():
        print("nothing to stop: no service was started from this folder")
        return 0
    head = json.loads(STATE.read_text())
    for number, patience_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
        left = _processes(head)
        targets = left if number == signal.SIGKILL else left & {head["pid"]}
        if not targets:
            continue
        print(f"stopping Ray ({len(left)} processes)", flush=True)
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while _processes(head) and time.monotonic() < deadline:
            time.sleep(0.2)
    STATE.unlink()
    print("stopped")
    return 0


def describe(name: str, state: dict[str, Any]) -> str:
    """One application's state in a line: its deployments' replicas, running of wanted."""
    parts = []
    for deployment, info in state.get("deployments", {}).items():
        running = sum(replica["state"] == "RUNNING" for replica in info.get("replicas", []))
        wanted = info.get("target_num_replicas") or len(info.get("replicas", []))
        parts.append(f"{deployment} {running}/{wanted}")
    return f"{name} {state['status']} ({', '.join(parts)})" if parts else f"{name} {state['status']}"


def _tool(name: str, *arguments: str) -> None:
    """Run a command-line tool of this environment. Raises ``SetupError`` with its output where it fails."""
    command = [str(Path(sys.executable).with_name(name)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SetupError(f"`{name} {arguments[0]}` failed:\n{done.stdout}{done.stderr}")


def applications(dashboard: str) -> dict[str, Any] | None:
    """State of every Serve application by name; None while the dashboard does not answer.

    Raises ``SetupError`` for what is no address, and where the dashboard does not know this user's token.
    """
    if not dashboard.startswith(("http://", "https://")):
        raise SetupError(f"{dashboard!r} is no dashboard's address; allowed: http://HOST:PORT or https://HOST:PORT")
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient  # reads RAY_AUTH_MODE once, when it is imported
    from ray.exceptions import AuthenticationError

    try:
        # Ray's own client, since it brings the cluster's authentication token where one is required.
        details = ServeSubmissionClient(dashboard).get_serve_details()
    except AuthenticationError:
        raise SetupError(
            f"Ray's dashboard at {dashboard} refuses this user's token; allowed: the cluster's, in ~/.ray/auth_token"
        ) from None
    except (ConnectionError, RuntimeError, OSError):
        return None
    found: dict[str, Any] = details.get("applications", {})
    return found


def _born(pid: int) -> str:
    """Names one life of a process id: the machine's boot and the clock tick of the process' start."""
    return f"{_boot()} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _processes(head: dict[str, Any]) -> set[int]:
    """Processes of the Unix session that the head in the state file leads, zombies left out.

    Empty where its process id is somebody else's by now, after a restart of the machine, say.
    """
    try:
        ours = head.get("born") in (None, _born(head["pid"]))
    except OSError:  # it is gone; its id is not given out again while its session has members
        ours = head.get("born", _boot()).startswith(_boot())
    members: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session, *_ = stat.read_text().rpartition(")")[2].split()
            if ours and int(session) == head["pid"] and state != "Z":
                members.add(int(stat.parent.name))
    return members


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what only waits to be forgotten does not matter
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True


def _free_port(preferred: int) -> int:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    raise SystemExit(main())

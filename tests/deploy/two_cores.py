"""`deployments/configs/cluster.yaml` for a machine of two cores that holds all of its nodes: the same, but smaller."""

from __future__ import annotations

import re
from typing import Any

import yaml
from host_rig import ROOT, Host


def cluster_config(downscale_delay_s: float = 300.0) -> dict[str, Any]:
    """Deadlines are generous: all share two cores, and only tokens and places matter here."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "deployments" / "configs" / "cluster.yaml").read_text())
    service, drafters = (application["args"] for application in config["applications"])
    service["model"]["threads"] = 2
    service["engine"] |= {"draft_deadline_steps": 100.0, "draft_deadline_max_ms": 2000.0}
    service["target"]["ray_actor_options"]["num_cpus"] = 0.5
    service["ingress"]["ray_actor_options"]["num_cpus"] = 0.1
    for stage in drafters["stages"]:
        stage["actor_options"] |= {"num_cpus": 0.3, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
        stage["deployment"]["placement_group_bundles"] = [{"CPU": 0.3, "draft": 1}]
        stage["deployment"]["autoscaling_config"]["downscale_delay_s"] = downscale_delay_s
    return config


PROMPT = "Write a short poem about the sea. Then write the same poem again, word for word."


def ask(client: Host, door: Host, *options: str) -> str:
    """What `deployments.client` prints of one request and of the same with plain decoding; "" where it failed."""
    where = ["--address", f"{door.address}:9000", "--color", "never"]
    program = ["python", "-m", "deployments.client", *where, "--prompt", PROMPT, "--max-tokens", "48", "--compare"]
    done = client.run(*program, *options, timeout_s=240)
    return done.stdout if done.returncode == 0 else ""


def guessed_by_both(answer: str) -> bool:
    """Whether tokens of both drafters are in the answer, by the client's own count."""
    counts = re.search(r"small (\d+), medium (\d+), target", answer)
    return counts is not None and all(int(count) > 0 for count in counts.groups())


def actors(host: Host) -> list[str]:
    """Names of the actors that run on the host."""
    return [line.split("::")[1].split()[0].split(".")[0] for line in host.processes() if line.startswith("ray::")]


def daemons(host: Host) -> list[str]:
    """Ray's own processes on the host, and its workers."""
    return [line for line in host.processes() if re.search(r"/(raylet|gcs_server) |^ray::", line)]

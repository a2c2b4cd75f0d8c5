"""`ray up` for real: two hosts with SSH servers, a target on one and drafters on the other, and down again.

What differs from a user's hosts: they share this file system, so nothing is installed on them, and two cores.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from host_rig import ROOT, Host, hosts, missing, say, serve_ssh, waits_for
from two_cores import actors, ask, cluster_config, daemons, guessed_by_both

pytestmark = [pytest.mark.slow, pytest.mark.hosts, pytest.mark.weights, pytest.mark.timeout(1500)]

JOIN_LIMIT_S, SERVE_LIMIT_S, WAKE_LIMIT_S, GCS_LIMIT_S = 300.0, 300.0, 300.0, 60.0
STOP_LIMIT_S = 240.0  # `ray down` stops the head alone; the others end when they have missed the GCS for long
BOTH_STAGES = ("--stages", "small,medium")
NODES = "import ray; ray.init('auto', log_to_driver=False); print('nodes', sum(n['Alive'] for n in ray.nodes()))"


@dataclass(frozen=True, slots=True)
class Site:
    """The hosts, and the launcher file that is for them."""

    launcher: Host
    head: Host
    drafts: Host
    launch_file: Path

    def launch(self, *words: str) -> None:
        """One of Ray's commands on the launching host, shown with what it took."""
        start = time.monotonic()
        command = [str(self.launch_file) if word == "LOCAL" else word for word in words]
        done = self.launcher.run("env", "RAY_UP_enable_autoscaler_v2=0", *command, timeout_s=300)
        assert done.returncode == 0, done.stdout
        say(f"$ {' '.join(words)}".replace("LOCAL", "ray_config.local.yaml"))
        say(f"  done after {time.monotonic() - start:.1f} s")

    def ask(self, *options: str) -> str:
        return ask(self.launcher, self.head, *options)

    def status(self) -> str:
        return self.launcher.run("python", "-m", "deployments.status", "--address", f"{self.head.address}:9000").stdout

    def num_nodes(self) -> int:
        answer = self.head.run("env", "RAY_AUTH_MODE=token", "python", "-c", NODES).stdout
        return int(answer.rpartition("nodes")[2]) if "nodes" in answer else 0

    def gcs(self) -> list[str]:
        return self.head.run("pgrep", "-x", "gcs_server").stdout.split()


@pytest.fixture
def site() -> Iterator[Site]:
    if reason := missing("sshd", "ssh", "rsync"):
        pytest.skip(reason)
    # A short name, since Ray puts sockets below it.
    with tempfile.TemporaryDirectory(prefix="pl-", dir="/tmp") as name:
        folder = Path(name)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
        with hosts(folder, "launcher", "head", "drafts") as (launcher, head, drafts):
            for host, role, resources in ((head, "head", '{"target": 1}'), (drafts, "draft", '{"draft": 2}')):
                serve_ssh(host, folder / "key.pub")
                (host.home / "paceline.env").write_text(f"ROLE={role}\nRESOURCES='{resources}'\n")
                (host.home / "paceline").symlink_to(sys.prefix)  # what the set-up commands would install
            (folder / "configs").mkdir()
            (folder / "configs" / "cluster.yaml").write_text(yaml.safe_dump(cluster_config()))
            (folder / "local.yaml").write_text(yaml.safe_dump(launcher_file(folder, head, drafts)))
            yield Site(launcher, head, drafts, folder / "local.yaml")


def launcher_file(folder: Path, head: Host, drafts: Host) -> dict[str, Any]:
    """The one that is shipped, for these hosts."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "ray_config.local.yaml").read_text())
    loaded["provider"] |= {"head_ip": head.address, "worker_ips": [drafts.address]}
    loaded["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
    loaded["setup_commands"] = [line for line in loaded["setup_commands"] if "pip install" not in line]
    del loaded["file_mounts"]["~/dist"]
    loaded["file_mounts"]["~/configs"] = str(folder / "configs")
    return loaded


def test_ray_up_serves_from_a_target_on_one_host_and_drafters_on_another_until_ray_down(site: Site) -> None:
    site.launcher.check("ray", "get-auth-token", "--generate")
    site.launch("ray", "up", "--yes", "--no-config-cache", "LOCAL")
    waits_for("both hosts are in the cluster", JOIN_LIMIT_S, lambda: site.num_nodes() == 2)

    site.launch("ray", "exec", "LOCAL", "RAY_AUTH_MODE=token serve deploy configs/cluster.yaml")
    waits_for("the target serves", SERVE_LIMIT_S, lambda: bool(site.ask()))
    waits_for("guesses of both stages are accepted", WAKE_LIMIT_S, lambda: guessed_by_both(site.ask(*BOTH_STAGES)))
    show(site.ask(*BOTH_STAGES))
    on_head, on_drafts = set(actors(site.head)), set(actors(site.drafts))
    assert {"ServeReplica:paceline:Target", "ServeReplica:paceline:Ingress"} <= on_head - on_drafts
    assert "DraftActor" in on_drafts - on_head

    lose_the_gcs(site)
    show(site.status())

    site.launch("ray", "down", "--yes", "LOCAL")
    waits_for("no process of Ray is left", STOP_LIMIT_S, lambda: not daemons(site.head) + daemons(site.drafts))
    assert not any("gcs_keeper" in line for line in site.head.processes())


def lose_the_gcs(site: Site) -> None:
    """Kill it while a request runs: the request goes on, the keeper starts it again, and drafters are still leased."""
    (before,) = site.gcs()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(site.ask, *BOTH_STAGES, "--max-tokens", "300")
        waits_for("a request runs", SERVE_LIMIT_S, lambda: "1 running" in site.status(), 0.2)
        site.head.check("kill", "-9", before)
        waits_for("another GCS runs", GCS_LIMIT_S, lambda: bool(site.gcs()) and site.gcs() != [before], 0.2)
        assert "plain decoding: the same" in running.result()
    waits_for("both hosts are in the cluster", JOIN_LIMIT_S, lambda: site.num_nodes() == 2)
    waits_for("guesses of both stages are accepted", WAKE_LIMIT_S, lambda: guessed_by_both(site.ask(*BOTH_STAGES)))


def show(text: str) -> None:
    say("\n".join(f"  | {line}" for line in text.strip().splitlines()))

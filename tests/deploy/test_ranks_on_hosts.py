"""A target whose ranks are on different hosts: one rank's tokens, and nobody waits for a host that is gone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from host_rig import ROOT, Host, hosts, missing, waits_for
from two_cores import actors, ask

pytestmark = [pytest.mark.slow, pytest.mark.hosts, pytest.mark.weights, pytest.mark.timeout(900)]

SERVE_LIMIT_S = 300.0
START = ("env", "RAY_AUTH_MODE=token", "ray", "start", "--num-cpus=2", "--disable-usage-stats")


def config() -> dict[str, Any]:
    """`cpu_tp3.yaml`, spread over the nodes; both doors on the head."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "deployments" / "configs" / "cpu_tp3.yaml").read_text())
    loaded["applications"][0]["args"]["target"]["placement_group_strategy"] = "SPREAD"
    return loaded


@pytest.fixture
def pair() -> Iterator[tuple[Host, Host]]:
    """Two hosts of one Ray cluster, on which the service is deployed."""
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="pl-", dir="/tmp") as name:
        file = Path(name, "config.yaml")
        file.write_text(yaml.safe_dump(config()))
        with hosts(Path(name), "launcher", "head", "other") as (_, head, other):
            head.check("ray", "get-auth-token", "--generate")
            token = Path(".ray") / "auth_token"
            (other.home / token.parent).mkdir(exist_ok=True)
            (other.home / token).write_text((head.home / token).read_text())
            head.check(*START, "--head", "--port=6379", f"--node-ip-address={head.address}")
            other.check(*START, f"--address={head.address}:6379", f"--node-ip-address={other.address}")
            head.check("env", "RAY_AUTH_MODE=token", "serve", "deploy", str(file))
            yield head, other


def test_ranks_on_two_hosts_answer_as_one_and_their_target_is_replaced_when_one_dies(pair: tuple[Host, Host]) -> None:
    head, other = pair
    waits_for("the target serves", SERVE_LIMIT_S, lambda: bool(ask(head, head)))
    placed = {host.name: ranks(host) for host in pair}
    assert sum(placed.values()) == 2
    assert placed["other"] > 0
    assert "plain decoding: the same 48 tokens" in ask(head, head)

    other.check("pkill", "-9", "-f", "ray::RankActor")
    waits_for("the target serves again", SERVE_LIMIT_S, lambda: "the same 48 tokens" in ask(head, head))


def ranks(host: Host) -> int:
    return actors(host).count("RankActor")

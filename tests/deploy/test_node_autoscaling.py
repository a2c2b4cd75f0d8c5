"""Nodes come for drafters that wait for one, and go when nobody drafts: Ray's autoscaler over its fake node provider.

The node types are those of `ray_config.yaml`. In a namespace, since the provider's nodes look for port 6379.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from host_rig import ROOT, Host, hosts, missing, waits_for
from two_cores import actors, ask, cluster_config, daemons, guessed_by_both

pytestmark = [pytest.mark.slow, pytest.mark.hosts, pytest.mark.weights, pytest.mark.timeout(1500)]

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_NODE_ID = f"{'f' * 51}00000"  # the provider's name for the node it stands on
START = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE_ID,
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
SERVE_LIMIT_S, UP_LIMIT_S, DOWN_LIMIT_S = 240.0, 180.0, 180.0
DOWNSCALE_DELAY_S, IDLE_TIMEOUT_MINUTES = 3.0, 0.1
# What its nodes, processes on this host, do not need, but the autoscaler does not start without.
EMPTY = [
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
]


def launcher() -> dict[str, Any]:
    """The launcher file over the fake provider; the head carries the target, too."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    types = loaded["available_node_types"]
    draft = types["draft"] | {"node_config": {}, "resources": {"CPU": 1, **types["draft"]["resources"]}}
    head = types["head"] | {"node_config": {}, "resources": {"CPU": 1, "target": 1}}
    return {
        "cluster_name": "fake",
        "max_workers": loaded["max_workers"],
        "idle_timeout_minutes": IDLE_TIMEOUT_MINUTES,
        "upscaling_speed": loaded["upscaling_speed"],
        "provider": {"type": "external", "module": PROVIDER, "launch_multiple": True, "head_node_id": HEAD_NODE_ID},
        "auth": {},
        "available_node_types": {"ray.head.default": head, "draft": draft},
        "head_node_type": "ray.head.default",
        **{field: [] for field in EMPTY},
    }


@pytest.fixture
def host() -> Iterator[Host]:
    """A host whose Ray head may bring up nodes; the service runs on it, nobody drafts yet."""
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="pl-", dir="/tmp") as name, hosts(Path(name), "host") as (only,):
        launch_file, config = Path(name, "fake.yaml"), Path(name, "cluster.yaml")
        launch_file.write_text(yaml.safe_dump(launcher()))
        config.write_text(yaml.safe_dump(cluster_config(DOWNSCALE_DELAY_S)))
        only.check("ray", "get-auth-token", "--generate")
        environment = [f"{name}={value}" for name, value in START.items()]
        labels = ["--labels=role=head", "--num-cpus=1", '--resources={"target": 1}']
        start = ["ray", "start", "--head", "--port=6379", *labels, f"--autoscaling-config={launch_file}"]
        only.check("env", *environment, *start, timeout_s=240)
        only.check("env", *environment, "serve", "deploy", str(config), timeout_s=240)
        yield only


def test_a_drafter_without_a_node_brings_one_up_and_an_idle_node_goes_away(host: Host) -> None:
    waits_for("the target serves", SERVE_LIMIT_S, lambda: bool(ask(host, host)))
    waits_for("nodes of idle drafters are gone", DOWN_LIMIT_S, lambda: nodes(host) == 1)
    assert "DraftActor" not in actors(host)

    both = ("--stages", "small,medium")
    waits_for("guesses of both stages are accepted", UP_LIMIT_S, lambda: guessed_by_both(ask(host, host, *both)))
    assert nodes(host) > 1
    assert actors(host).count("DraftActor") == 2
    assert "plain decoding: the same 48 tokens" in ask(host, host, *both)

    waits_for("idle drafters are gone", DOWN_LIMIT_S, lambda: "DraftActor" not in actors(host))
    waits_for("their nodes are gone", DOWN_LIMIT_S, lambda: nodes(host) == 1)
    assert "ServeReplica:paceline:Target" in actors(host)
    assert "the same 48 tokens" in ask(host, host)


def nodes(host: Host) -> int:
    return sum("/raylet " in line for line in daemons(host))

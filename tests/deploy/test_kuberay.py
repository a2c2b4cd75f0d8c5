"""The RayService serves what the other forms serve, with pods on which it fits.

The operator's own schema is not ours to ship: the file was checked against it by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import yaml

from deployments.up import RAY_ENV

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "deployments" / "kuberay"


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((KUBERAY / name).read_text())
    return loaded


def cluster() -> dict[str, Any]:
    spec: dict[str, Any] = manifest("rayservice.yaml")["spec"]["rayClusterConfig"]
    return spec


def groups() -> list[dict[str, Any]]:
    return [cluster()["headGroupSpec"], *cluster()["workerGroupSpecs"]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def test_it_serves_what_the_cluster_configuration_has_on_a_pods_own_address() -> None:
    served = yaml.safe_load(manifest("rayservice.yaml")["spec"]["serveConfigV2"])
    expected = yaml.safe_load((ROOT / "deployments" / "configs" / "cluster.yaml").read_text())
    assert expected["http_options"].pop("host") == "127.0.0.1"
    assert served["http_options"].pop("host") == "0.0.0.0"
    assert served == expected


def test_ray_is_the_one_that_is_installed() -> None:
    assert cluster()["rayVersion"] == ray.__version__
    assert f"FROM rayproject/ray:{ray.__version__}-py311" in (KUBERAY / "Dockerfile").read_text()


def test_groups_have_the_roles_and_resources_of_the_launcher_files_node_types() -> None:
    launcher = yaml.safe_load((ROOT / "ray_config.yaml").read_text())["available_node_types"]
    for group in cluster()["workerGroupSpecs"]:
        node = launcher[group["groupName"]]
        assert group["labels"] == node["labels"]
        assert {name: int(amount) for name, amount in group["resources"].items()} == node["resources"]
        assert (group["minReplicas"], group["maxReplicas"]) == (node["min_workers"], node["max_workers"])
    assert cluster()["headGroupSpec"]["labels"] == launcher["head"]["labels"]


def test_the_actors_fit_on_the_pods() -> None:
    service, drafters = (
        application["args"]
        for application in yaml.safe_load(manifest("rayservice.yaml")["spec"]["serveConfigV2"])["applications"]
    )
    cpus = {group["labels"]["role"]: int(container(group)["resources"]["limits"]["cpu"]) for group in groups()}
    assert service["target"]["ray_actor_options"]["num_cpus"] <= cpus["target"]
    assert service["ingress"]["ray_actor_options"]["num_cpus"] <= cpus["head"]
    assert sum(stage["actor_options"]["num_cpus"] for stage in drafters["stages"]) <= cpus["draft"]


def test_pods_have_one_image_and_the_projects_environment() -> None:
    # The operator sets the authentication itself; Ray's draining at shutdown is for `make stop`.
    expected = {name: value for name, value in RAY_ENV.items() if "AUTH" not in name and "DRAIN" not in name}
    for group in groups():
        assert {entry["name"]: entry["value"] for entry in container(group)["env"]} == expected
    assert len({container(group)["image"] for group in groups()}) == 1
    assert cluster()["authOptions"] == {"mode": "token"}


def test_the_doors_ports_are_open_on_the_head_in_the_service_and_in_the_policy_and_no_others_to_clients() -> None:
    config = yaml.safe_load(manifest("rayservice.yaml")["spec"]["serveConfigV2"])
    doors = {config["http_options"]["port"], config["grpc_options"]["port"]}
    assert doors <= {port["containerPort"] for port in container(cluster()["headGroupSpec"])["ports"]}
    assert doors == {port["port"] for port in manifest("rayservice.yaml")["spec"]["serveService"]["spec"]["ports"]}
    (clients,) = [rule for rule in manifest("network_policy.yaml")["spec"]["ingress"] if "paceline-client" in str(rule)]
    assert doors == {port["port"] for port in clients["ports"]}

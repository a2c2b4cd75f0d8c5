"""The cluster launcher files and the configuration for them: Ray accepts all, and each asks for what another has."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.core.config import DraftersConfig, ServiceConfig, parse_config
from deployments.codec import MAX_REQUEST_BYTES
from deployments.up import RAY_ENV

ROOT = Path(__file__).resolve().parents[1]
FILES = ("ray_config.yaml", "ray_config.local.yaml")
CONFIGS = sorted((ROOT / "deployments" / "configs").glob("*.yaml"))
# A head that is launched is stopped with `ray stop`, which does not drain.
CLUSTER_ENV = {name: value for name, value in RAY_ENV.items() if "DRAIN" not in name}
PERSISTENT_GCS = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "$HOME/paceline-gcs"}


def launcher(name: str = "ray_config.yaml") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return loaded


def applications(config: Path) -> dict[str, dict[str, Any]]:
    loaded = yaml.safe_load(config.read_text())
    return {application["name"]: application["args"] for application in loaded["applications"]}


CLUSTERS = ["cluster.yaml", "cluster_gpu.yaml"]


def cluster_configs(name: str = "cluster.yaml") -> tuple[ServiceConfig, DraftersConfig]:
    found = applications(ROOT / "deployments" / "configs" / name)
    return parse_config(ServiceConfig, found["paceline"]), parse_config(DraftersConfig, found["paceline-drafters"])


@pytest.mark.parametrize("name", FILES)
def test_the_launcher_files_pass_rays_own_checks(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(launcher(name)))


def test_rays_own_checks_notice_a_misspelt_key() -> None:
    from jsonschema import ValidationError  # type: ignore[import-untyped]
    from ray.autoscaler._private.util import prepare_config, validate_config

    misspelt = launcher()
    misspelt["available_node_types"]["draft"]["max_worker"] = 1
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config(misspelt))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["head", "worker"])
def test_nodes_start_ray_with_the_projects_environment(name: str, kind: str) -> None:
    (start,) = [command for command in launcher(name)[f"{kind}_start_ray_commands"] if "ray start" in command]
    expected = CLUSTER_ENV | (PERSISTENT_GCS if kind == "head" else {})
    assert dict(re.findall(r"(RAY_\w+)=(\S+)", start.split("ray start")[0])) == expected


def test_the_unit_starts_ray_with_the_projects_environment() -> None:
    unit = (ROOT / "deployments" / "systemd" / "paceline-head.service").read_text()
    given = dict(re.findall(r"^Environment=(RAY_\w+)=(\S+)$", unit, re.MULTILINE))
    assert given == CLUSTER_ENV | PERSISTENT_GCS | {"RAY_gcs_storage_path": "/var/lib/paceline/gcs"}


@pytest.mark.parametrize("page", ["README.md", "docs/gpus.md"])
def test_pages_that_start_ray_by_hand_give_it_what_is_not_only_for_speed(page: str) -> None:
    lines = re.findall(r"^export (RAY_.*?)(?: +#.*)?$", (ROOT / page).read_text(), re.MULTILINE)
    given = dict(setting.split("=") for line in lines for setting in line.split())
    assert given.items() <= CLUSTER_ENV.items()
    assert {"RAY_AUTH_MODE", "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"} <= given.keys()


def test_the_grpc_door_takes_more_than_a_request_may_have_and_not_rays_two_gib() -> None:
    """So that the door itself refuses a request that is somewhat too large, and says so."""
    assert MAX_REQUEST_BYTES < int(RAY_ENV["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"]) <= 2 * MAX_REQUEST_BYTES


@pytest.mark.parametrize("name", FILES)
def test_the_head_begins_with_an_empty_gcs_and_keeps_it_alive(name: str) -> None:
    first, _, last = launcher(name)["head_start_ray_commands"]
    folder = PERSISTENT_GCS["RAY_gcs_storage_path"].replace("$HOME", "~")
    assert first == f"ray stop; rm -rf {folder}"
    module = re.search(r"python -m (\S+) ", last)
    assert module is not None
    assert importlib.util.find_spec(module[1]) is not None


def commands(launch: dict[str, Any]) -> list[str]:
    """Of all nodes, and of single types."""
    places = [launch, *launch.get("available_node_types", {}).values()]
    return [command for place in places for key, found in place.items() if "commands" in key for command in found]


@pytest.mark.parametrize("command", [command for name in FILES for command in commands(launcher(name))])
def test_commands_are_ones_that_a_shell_takes(command: str) -> None:
    subprocess.run(["bash", "-n", "-c", f"(export A=1;{command})"], check=True)


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_copied_to_nodes_exist_or_are_made_by_a_command_of_the_header(name: str) -> None:
    header = (ROOT / name).read_text().split("cluster_name:")[0]
    for source in launcher(name)["file_mounts"].values():
        made = (source == "dist" and "-w dist" in header) or (source.endswith("auth_token") and "--generate" in header)
        assert made or (ROOT / source).exists(), source


def test_hosts_of_ones_own_say_what_they_are_for_in_the_words_of_the_node_types() -> None:
    header = (ROOT / "ray_config.local.yaml").read_text().split("cluster_name:")[0]
    roles = {role: json.loads(resources) for role, resources in re.findall(r"ROLE=(\w+) +RESOURCES='(.*)'", header)}
    types = launcher()["available_node_types"]
    assert roles == {name: node["resources"] for name, node in types.items() if name in roles}
    assert roles.keys() == {"head", "target", "draft", "gpu"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_is_one_that_serve_and_the_builders_accept(config: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from deployments.app import build_drafters, build_service

    ServeDeploySchema.model_validate(yaml.safe_load(config.read_text()))
    found = applications(config)
    builders = {"paceline": build_service, "paceline-drafters": build_drafters}
    for name, arguments in found.items():
        builders[name](arguments)
    assert ("paceline-drafters" in found) == bool(found.get("paceline", {"remote_stages": True}).get("remote_stages"))


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_target_and_the_draft_workers_fit_on_the_nodes_that_are_theirs(name: str) -> None:
    nodes = launcher()["available_node_types"]
    service, drafters = cluster_configs(name)
    wanted = service.target["ray_actor_options"]
    kind = "gpu" if "num_gpus" in wanted else "target"
    assert fits(
        {"CPU": wanted["num_cpus"], "GPU": wanted.get("num_gpus", 0), **wanted.get("resources", {})}, nodes[kind]
    )
    for stage in drafters.stages:
        (bundle,) = stage.deployment["placement_group_bundles"]
        options = stage.actor_options
        worker = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
        assert bundle == {name: amount for name, amount in worker.items() if amount}, "the bundle must hold the worker"
        assert fits(bundle, nodes["gpu" if "GPU" in bundle else "draft"])
    assert [name for name, node in nodes.items() if "draft" in node["resources"]] == ["draft"]
    assert [name for name, node in nodes.items() if "target" in node["resources"]] == ["target"]


INSTANCES = {"c7i.4xlarge": {"CPU": 16}, "c7i.2xlarge": {"CPU": 8}, "g6e.4xlarge": {"CPU": 16, "GPU": 1}}


def fits(wanted: dict[str, float], node: dict[str, Any]) -> bool:
    has = INSTANCES[node["node_config"]["InstanceType"]] | node["resources"]
    return all(amount <= has.get(name, 0) for name, amount in wanted.items())


def test_nodes_with_gpus_get_what_needs_one() -> None:
    """And no more of them come than the service's targets and drafters may ask for at once."""
    node = launcher()["available_node_types"]["gpu"]
    service, drafters = cluster_configs("cluster_gpu.yaml")
    on_gpus = [stage for stage in drafters.stages if "num_gpus" in stage.actor_options]
    replicas = [stage.deployment["autoscaling_config"]["max_replicas"] for stage in on_gpus]
    assert node["max_workers"] == 1 + sum(replicas)
    assert node["docker"]["worker_image"].endswith("-gpu")
    assert not any("download.pytorch.org/whl/cpu" in command for command in node["worker_setup_commands"])
    assert service.model.kernels == "triton"
    assert {stage.model.kernels for stage in on_gpus if stage.model} == {"triton"}


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_doors_stand_on_the_head(name: str) -> None:
    nodes = launcher()
    selector = cluster_configs(name)[0].ingress["ray_actor_options"]["label_selector"]
    matching = [
        name for name, node in nodes["available_node_types"].items() if selector.items() <= node["labels"].items()
    ]
    assert matching == [nodes["head_node_type"]]


@pytest.mark.parametrize("name", CLUSTERS)
def test_workers_are_added_before_their_leases_would_be_refused(name: str) -> None:
    for stage in cluster_configs(name)[1].stages:
        scaling = stage.deployment["autoscaling_config"]
        assert scaling["target_ongoing_requests"] < stage.max_sessions


@pytest.mark.weights
@pytest.mark.cluster
def test_the_first_lease_wakes_a_stage_that_has_scaled_to_zero(ray_cluster) -> None:  # type: ignore[no-untyped-def]
    from ray import serve

    from deployments.app import build_drafters

    arguments = copy.deepcopy(applications(ROOT / "deployments" / "configs" / "cluster.yaml")["paceline-drafters"])
    small = next(stage for stage in arguments["stages"] if stage["name"] == "small")
    # The one node of the tests' cluster has no custom resources.
    del small["deployment"]["placement_group_bundles"][0]["draft"], small["actor_options"]["resources"]
    serve.run(build_drafters({**arguments, "stages": [small]}), name="asleep", route_prefix=None)
    try:
        assert not serve.status().applications["asleep"].deployments["Draft-small"].replica_states
        leases = serve.get_deployment_handle("Draft-small", "asleep").options(stream=True).open.remote("v", "session")
        assert next(iter(leases)).facts.stage == "small"
        assert serve.status().applications["asleep"].deployments["Draft-small"].replica_states == {"RUNNING": 1}
        leases.cancel()
    finally:
        serve.delete("asleep")

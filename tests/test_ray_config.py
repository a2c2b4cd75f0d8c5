"""The cluster launcher file and the configuration it is for: Ray accepts both, and each asks for what the other has."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.core.config import DraftersConfig, ServiceConfig, parse_config
from deployments.up import RAY_ENV

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "deployments" / "configs").glob("*.yaml"))
# A head that is launched is stopped with `ray stop`, which does not drain.
CLUSTER_ENV = {name: value for name, value in RAY_ENV.items() if "DRAIN" not in name}


def launcher() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    return loaded


def applications(config: Path) -> dict[str, dict[str, Any]]:
    loaded = yaml.safe_load(config.read_text())
    return {application["name"]: application["args"] for application in loaded["applications"]}


def cluster_configs() -> tuple[ServiceConfig, DraftersConfig]:
    found = applications(ROOT / "deployments" / "configs" / "cluster.yaml")
    return parse_config(ServiceConfig, found["paceline"]), parse_config(DraftersConfig, found["paceline-drafters"])


def test_the_launcher_file_passes_rays_own_checks() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(launcher()))


def test_rays_own_checks_notice_a_misspelt_key() -> None:
    from jsonschema import ValidationError  # type: ignore[import-untyped]
    from ray.autoscaler._private.util import prepare_config, validate_config

    misspelt = launcher()
    misspelt["available_node_types"]["draft"]["max_worker"] = 1
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config(misspelt))


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_nodes_start_ray_with_the_projects_environment(commands: str) -> None:
    (start,) = [command for command in launcher()[commands] if "ray start" in command]
    assert dict(re.findall(r"(RAY_\w+)=(\S+)", start.split("ray start")[0])) == CLUSTER_ENV


def test_files_that_are_copied_to_nodes_exist_or_are_made_by_a_command_of_the_header() -> None:
    header = (ROOT / "ray_config.yaml").read_text().split("cluster_name:")[0]
    for source in launcher()["file_mounts"].values():
        made = (source == "dist" and "-w dist" in header) or (source.endswith("auth_token") and "--generate" in header)
        assert made or (ROOT / source).exists(), source


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_is_one_that_serve_and_the_builders_accept(config: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from deployments.app import build_drafters, build_service

    ServeDeploySchema.model_validate(yaml.safe_load(config.read_text()))
    found = applications(config)
    assert set(found) == {"paceline", "paceline-drafters"}
    build_service(found["paceline"])
    build_drafters(found["paceline-drafters"])


def test_the_target_and_the_draft_workers_fit_on_the_nodes_that_are_theirs() -> None:
    nodes = launcher()["available_node_types"]
    service, drafters = cluster_configs()
    wanted = service.target["ray_actor_options"]["resources"]
    assert wanted["target"] <= nodes["target"]["resources"]["target"]
    for stage in drafters.stages:
        (bundle,) = stage.deployment["placement_group_bundles"]
        options = stage.actor_options
        assert bundle == {"CPU": options["num_cpus"], **options["resources"]}, "the bundle must hold the worker"
        assert bundle["draft"] <= nodes["draft"]["resources"]["draft"]
    assert [name for name, node in nodes.items() if "draft" in node["resources"]] == ["draft"]
    assert [name for name, node in nodes.items() if "target" in node["resources"]] == ["target"]


def test_the_doors_stand_on_the_head() -> None:
    nodes = launcher()
    selector = cluster_configs()[0].ingress["ray_actor_options"]["label_selector"]
    matching = [
        name for name, node in nodes["available_node_types"].items() if selector.items() <= node["labels"].items()
    ]
    assert matching == [nodes["head_node_type"]]


def test_workers_are_added_before_their_leases_would_be_refused() -> None:
    for stage in cluster_configs()[1].stages:
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

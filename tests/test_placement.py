"""Where ranks are placed, as Serve and Ray are told."""

from __future__ import annotations

import os

import pytest

from cluster.core.config import ServiceConfig, StageConfig, parse_config
from cluster.core.errors import ConfigError
from cluster.placement import LEAST_CPUS, rank_placement, rank_resources
from deployments.app import draft_options, target_options


def test_one_rank_needs_no_placement_group() -> None:
    assert rank_placement({"name": "Target"}, {"num_cpus": 4}, 1) == {"name": "Target"}


def test_every_rank_gets_the_replicas_share_and_the_first_its_custom_resources() -> None:
    options = rank_placement({}, {"num_cpus": 2, "num_gpus": 1, "resources": {"target": 1}}, 3)
    own = {"CPU": 2.0, "GPU": 1.0}
    assert options["placement_group_bundles"] == [{**own, "target": 1}, own, own]
    assert options["placement_group_strategy"] == "STRICT_PACK"
    assert rank_resources(own) == {"num_cpus": 2.0, "num_gpus": 1.0, "resources": {}}


def test_every_rank_gets_the_replicas_memory_and_kind_of_gpu() -> None:
    bundles = rank_placement({}, {"num_cpus": 0, "num_gpus": 1, "memory": 4e9, "accelerator_type": "H100"}, 2)
    own = {"GPU": 1.0, "memory": 4e9, "accelerator_type:H100": 0.001}
    assert bundles["placement_group_bundles"] == [own, own]
    assert rank_resources(own) == {
        "num_cpus": 0.0,
        "num_gpus": 1.0,
        "resources": {"accelerator_type:H100": 0.001},
        "memory": 4e9,
    }


def test_ranks_that_would_share_a_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_gpus: 0\.5 for each of 2 ranks; allowed: 0 or 1"):
        rank_placement({}, {"num_gpus": 0.5}, 2)


def test_a_replica_that_asks_for_nothing_still_has_a_bundle_a_rank() -> None:
    bundles = rank_placement({}, {"num_cpus": 0}, 2)["placement_group_bundles"]
    assert len(bundles) == 2
    assert all(sum(bundle.values()) > 0 for bundle in bundles)


def test_fewer_bundles_than_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="placement_group_bundles: 1 for 2 ranks; allowed: one for each"):
        rank_placement({"placement_group_bundles": [{"CPU": 4}]}, {"num_cpus": 2}, 2)


def test_the_targets_deployment_is_placed_by_its_size_and_the_configuration_goes_first() -> None:
    config = {"model": {"tensor_parallel_size": 2}, "target": {"ray_actor_options": {"num_cpus": 3}}}
    options = target_options(parse_config(ServiceConfig, config))
    assert options["placement_group_bundles"] == [{"CPU": 3.0}, {"CPU": 3.0}]
    own = {**config, "target": {"placement_group_bundles": [{"CPU": 1}, {"CPU": 4}]}}
    assert target_options(parse_config(ServiceConfig, own))["placement_group_bundles"] == [{"CPU": 1}, {"CPU": 4}]
    assert "placement_group_bundles" not in target_options(ServiceConfig())


def test_a_drafters_ranks_are_placed_as_a_targets_are() -> None:
    stage = {
        "name": "medium",
        "drafter": "draft_model",
        "model": {"tensor_parallel_size": 2},
        "actor_options": {"num_cpus": 2, "num_gpus": 1, "resources": {"draft": 1}},
    }
    options = draft_options(parse_config(StageConfig, stage))
    own = {"CPU": 2.0, "GPU": 1.0}
    assert options["placement_group_bundles"] == [{**own, "draft": 1}, own]
    spread = {**stage, "deployment": {"placement_group_strategy": "SPREAD"}}
    assert draft_options(parse_config(StageConfig, spread))["placement_group_strategy"] == "SPREAD"
    assert "placement_group_bundles" not in draft_options(parse_config(StageConfig, {**stage, "model": {}}))


def test_a_drafter_in_the_targets_process_has_one_rank() -> None:
    stage = {"name": "medium", "drafter": "draft_model", "model": {"tensor_parallel_size": 2}}
    with pytest.raises(ConfigError, match="tensor_parallel_size: 2 is for remote stages; allowed here: 1"):
        parse_config(ServiceConfig, {"local_drafter": stage})


@pytest.mark.parametrize("drafter", ["sssd", "staged"])
def test_a_drafter_without_a_model_of_its_own_has_one_rank(drafter: str) -> None:
    stage = {"name": "medium", "drafter": drafter, "model": {"tensor_parallel_size": 2}}
    with pytest.raises(ConfigError, match=f"tensor_parallel_size: 2 is not for {drafter}; allowed: 1"):
        parse_config(StageConfig, stage)


def test_a_stage_that_asks_for_no_cpus_gets_none_for_its_ranks() -> None:
    stage = {"name": "medium", "drafter": "draft_model", "model": {"tensor_parallel_size": 2}}
    bundles = draft_options(parse_config(StageConfig, stage))["placement_group_bundles"]
    assert [sum(bundle.values()) for bundle in bundles] == [LEAST_CPUS, LEAST_CPUS]


@pytest.mark.parametrize(("threads", "reserved", "expected"), [(0, 8, "8"), (3, 8, "3"), (0, 0.5, str(os.cpu_count()))])
def test_a_targets_step_has_the_threads_that_are_configured_or_reserved(
    threads: int, reserved: float, expected: str
) -> None:
    model = {"source": "owner/name", "name": "m", "threads": threads}
    config = parse_config(ServiceConfig, {"model": model, "target": {"ray_actor_options": {"num_cpus": reserved}}})
    assert target_options(config)["ray_actor_options"]["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == expected

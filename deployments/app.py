"""Configuration to Serve applications: the import paths that ``deployments/configs/*.yaml`` name.

The only place where the plain classes become deployments.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray import serve

from cluster.core.config import DraftersConfig, ServiceConfig, StageConfig, parse_config
from cluster.leases import deployment_name
from cluster.placement import rank_placement
from deployments.autoscaling import POLICY
from deployments.draft import Draft, Drafters
from deployments.ingress import Ingress
from deployments.target import Target

ENGINES = {"tree": "cluster.launch:launch_engine", "vllm": "cluster.launch:launch_vllm"}
CONTROL_CALLS = 64
"""Calls besides generations that a target answers at once: info, load, abort."""


def build_service(args: dict[str, Any]) -> serve.Application:
    """The ``paceline`` application: doors and target. Raises ``ConfigError`` for ``args`` it cannot serve."""
    config = parse_config(ServiceConfig, args)
    return service_application(config, ENGINES[config.llm_engine])


def service_application(config: ServiceConfig, engine_factory: str) -> serve.Application:
    """The doors over targets that run the engine at ``engine_factory``, an import path ``module:function``."""
    target = serve.deployment(Target).options(**target_options(config)).bind(config, engine_factory)
    return serve.deployment(serve.ingress()(Ingress)).options(**ingress_options(config)).bind(config, target)


def build_drafters(args: dict[str, Any]) -> serve.Application:
    """The ``paceline-drafters`` application: one ``Draft`` deployment per stage, none of them with a route."""
    config = parse_config(DraftersConfig, args)
    stages = {
        stage.name: serve.deployment(Draft).options(**draft_options(stage)).bind(stage, config)
        for stage in config.stages
    }
    return serve.deployment(Drafters).options(num_replicas=1, ray_actor_options={"num_cpus": 0.0}).bind(stages)


def draft_options(stage: StageConfig) -> dict[str, Any]:
    """Serve options of a draft stage; what ``stage.deployment`` says goes first. The worker is an actor of its own."""
    defaults = {
        "name": deployment_name(stage.name),
        "max_ongoing_requests": stage.max_sessions,
        "health_check_period_s": 2.0,
        "graceful_shutdown_timeout_s": 5.0,
        "ray_actor_options": {"num_cpus": 0.0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
    }
    if scaling := stage.deployment.get("autoscaling_config"):
        defaults["autoscaling_config"] = {"policy": {"policy_function": POLICY}, **scaling}
    return rank_placement(merge(defaults, stage.deployment), {"num_cpus": 0, **stage.actor_options}, stage.num_ranks)


def target_options(config: ServiceConfig) -> dict[str, Any]:
    """Serve options of the target; what ``config.target`` says goes first.

    Admission is the engine's: it must see every request it could queue and then one to refuse, so Serve lets more
    through than the engine takes.
    """
    sessions = config.engine.kv_slots + config.engine.max_waiting
    defaults = {
        "name": "Target",
        "max_ongoing_requests": 2 * sessions + CONTROL_CALLS,
        "max_queued_requests": sessions + CONTROL_CALLS,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
        "graceful_shutdown_timeout_s": 10.0,
        "ray_actor_options": {"num_cpus": 0.5, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(_threads(config))}}},
    }
    options = merge(defaults, config.target)
    return rank_placement(options, options["ray_actor_options"], config.model.tensor_parallel_size)


def _threads(config: ServiceConfig) -> int:
    """Of a target's ranks: as configured, or as reserved for them, or else this machine's, which may be another."""
    each = config.target.get("ray_actor_options", {}).get("num_cpus") or 0.0
    return config.model.threads or int(each * config.model.tensor_parallel_size) or os.cpu_count() or 1


def ingress_options(config: ServiceConfig) -> dict[str, Any]:
    """Serve options of the ingress; what ``config.ingress`` says goes first."""
    defaults = {
        "name": "Ingress",
        "max_ongoing_requests": 2048,
        "max_queued_requests": 2048,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1.0},
        "graceful_shutdown_timeout_s": 60.0,  # a door that is replaced lets its streams end
        "ray_actor_options": {
            "num_cpus": 0.1,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}},
        },
    }
    return merge(defaults, config.ingress)


def merge(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``overrides`` over ``defaults``, mappings inside mappings merged alike."""
    merged = dict(defaults)
    for key, value in overrides.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged

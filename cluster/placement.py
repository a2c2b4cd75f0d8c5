"""Where a model's ranks are placed: one bundle a rank; rank 0 in the first, with the replica it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.core.errors import ConfigError

LEAST_CPUS = 0.01  # a bundle must hold something
KIND_SHARE = 0.001  # by which Ray asks for an accelerator_type
STRATEGY = "STRICT_PACK"  # all on one node: they meet 2 * layers times a step; the configuration may say another


def rank_placement(deployment: Mapping[str, Any], actor_options: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The Serve options ``deployment`` of a target or a drafter of ``size`` ranks, and how its ranks are placed where
    they do not say it. One rank needs no placement group.

    actor_options: of rank 0. Every rank gets the CPUs, GPUs and memory it asks for; custom resources, which name the
    node, are asked for once. Raises ``ConfigError`` for ranks that share a GPU, and for fewer bundles than ranks.
    """
    if size == 1:
        return dict(deployment)
    share = _compute(actor_options)
    if (gpus := share.get("GPU", 0.0)) not in (0.0, 1.0):
        raise ConfigError(f"num_gpus: {gpus:g} for each of {size} ranks; allowed: 0 or 1")
    bundles = [{**share, **actor_options.get("resources", {})}, *({**share} for _ in range(1, size))]
    placed = {"placement_group_bundles": bundles, "placement_group_strategy": STRATEGY} | dict(deployment)
    if (given := len(placed["placement_group_bundles"])) < size:
        raise ConfigError(f"placement_group_bundles: {given} for {size} ranks; allowed: one for each, or none given")
    return placed


def rank_resources(bundle: Mapping[str, float]) -> dict[str, Any]:
    """Actor options of a rank that fills ``bundle``."""
    custom = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU", "memory")}
    options = {"num_cpus": bundle.get("CPU", 0.0), "num_gpus": bundle.get("GPU", 0.0), "resources": custom}
    return options | ({"memory": bundle["memory"]} if "memory" in bundle else {})


def _compute(actor_options: Mapping[str, Any]) -> dict[str, float]:
    cpus, gpus = float(actor_options.get("num_cpus", 1.0)), float(actor_options.get("num_gpus", 0.0))
    share = {"CPU": max(cpus, 0.0 if gpus else LEAST_CPUS), "GPU": gpus, "memory": actor_options.get("memory", 0.0)}
    if kind := actor_options.get("accelerator_type"):
        share[f"accelerator_type:{kind}"] = KIND_SHARE
    return {name: amount for name, amount in share.items() if amount}

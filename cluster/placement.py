"""Where a target's ranks are placed: one bundle a rank, the replica (rank 0) in the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEAST_CPUS = 0.01  # a bundle must hold something
STRATEGY = "STRICT_PACK"  # all on one node: they meet 2 * layers times a step; the configuration may say another


def target_placement(actor_options: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Serve options of a target of ``size`` ranks; none for one rank, which needs no placement group.

    actor_options: the replica's ``ray_actor_options``. Every rank gets the CPUs and GPUs the replica asks for; custom
    resources, which name the node, are asked for once.
    """
    if size == 1:
        return {}
    share = _compute(actor_options)
    bundles = [{**share, **actor_options.get("resources", {})}, *({**share} for _ in range(1, size))]
    return {"placement_group_bundles": bundles, "placement_group_strategy": STRATEGY}


def rank_resources(bundle: Mapping[str, float]) -> dict[str, Any]:
    """Actor options of a rank that fills ``bundle``."""
    custom = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": bundle.get("CPU", 0.0), "num_gpus": bundle.get("GPU", 0.0), "resources": custom}


def _compute(actor_options: Mapping[str, Any]) -> dict[str, float]:
    cpus, gpus = float(actor_options.get("num_cpus", 1.0)), float(actor_options.get("num_gpus", 0.0))
    share = {"CPU": max(cpus, 0.0 if gpus else LEAST_CPUS), "GPU": gpus}
    return {name: amount for name, amount in share.items() if amount}

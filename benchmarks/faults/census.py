"""Counts what a cluster holds: actors by class, object references, objects in the store, sessions of each stage.

    RAY_ADDRESS=... python -m benchmarks.faults.census

The last line is JSON.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from typing import Any

import ray
from ray import serve
from ray._private.internal_api import get_state_from_address, global_gc, node_stats

from benchmarks.faults.deploy import DRAFTERS

COLLECTING_S = 2.0


def census() -> dict[str, Any]:
    """Without this driver's own. ``references``: object references that workers own or hold, by the actor's class.

    Workers collect their garbage first: what cycles hold is not lost, and comes and goes between two full collections.
    """
    ray.init(log_to_driver=False)
    global_gc()
    time.sleep(COLLECTING_S)
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    classes = {
        actor["ActorID"]: actor["ActorClassName"]
        for actor in state.actor_table(None).values()
        if actor["State"] != "DEAD"
    }
    sessions = serve.get_app_handle(DRAFTERS).sessions.remote().result(timeout_s=30)
    nodes = [
        node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
        for node in state.node_table()
        if node["Alive"]
    ]
    references: Counter[str] = Counter()
    for worker in (worker for node in nodes for worker in node.core_workers_stats if worker.pid != os.getpid()):
        references[classes.get(worker.actor_id.hex(), "no actor")] += worker.num_object_refs_in_scope
    return {
        "actors": dict(sorted(Counter(classes.values()).items())),
        "references": dict(sorted(references.items())),
        "stored_objects": sum(node.store_stats.num_local_objects for node in nodes),
        "drafter_sessions": sessions,
    }


if __name__ == "__main__":
    print(json.dumps(census()))

"""Deploys a trial's applications on the cluster at ``RAY_ADDRESS``: a process of its own, since drivers come and go.

    echo '{"ports": [HTTP, GRPC], "service": {...}, "drafters": {...}}' | python -m benchmarks.faults.deploy

Applications stay when it ends. Prints nothing of use but errors.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions

from deployments.app import build_drafters, build_service

SERVICERS = [
    "protos.generation_pb2_grpc.add_GenerationServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]
SERVICE, DRAFTERS = "paceline", "paceline-drafters"


def deploy(plan: dict[str, Any]) -> None:
    http_port, grpc_port = plan["ports"]
    ray.init(log_to_driver=False)
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host="127.0.0.1", port=http_port),
        grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=SERVICERS),
    )
    serve.run(build_drafters(plan["drafters"]), name=DRAFTERS, route_prefix=None)
    serve.run(build_service(plan["service"]), name=SERVICE, route_prefix="/")


if __name__ == "__main__":
    deploy(json.load(sys.stdin))
    print("deployed")

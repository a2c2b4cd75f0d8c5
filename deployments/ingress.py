"""The Ingress deployment: both doors on one class. Stateless but for the calls in flight."""

from __future__ import annotations

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from cluster.core.config import ServiceConfig
from cluster.core.logs import show_logs_in_replica
from cluster.core.types import model_key_of, tokenizer_hash
from cluster.engine.weights import load_tokenizer, resolve_model
from deployments.codec import Codec
from deployments.ingress_grpc import GrpcDoor
from deployments.ingress_http import build_app
from deployments.service import Service
from deployments.targets import Targets


class Ingress(GrpcDoor):
    """Serve finds the gRPC methods on the class, and asks it for the HTTP application."""

    def __init__(self, config: ServiceConfig, target: DeploymentHandle) -> None:
        show_logs_in_replica()
        tokenizer = load_tokenizer(resolve_model(config.model.source, weights=False))
        model_key = model_key_of(config.model.name, tokenizer_hash(tokenizer.get_vocab()))
        codec = Codec(tokenizer, config.request_timeout_s, config.engine.priorities)
        self.service = Service(config, codec, Targets(target, model_key))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor (late-bound ``serve.ingress()``)."""
        return build_app(self.service)

"""The configuration: refusals name the key, the value and what is allowed."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from cluster.core.config import DraftersConfig, EngineConfig, ModelConfig, ServiceConfig, StageConfig, parse_config
from cluster.core.errors import ConfigError

STAGE = {"name": "small", "drafter": "sssd"}


@pytest.mark.parametrize("kind", [ServiceConfig, DraftersConfig, ModelConfig, EngineConfig])
def test_nothing_configured_means_the_defaults(kind: type[BaseModel]) -> None:
    assert parse_config(kind, {}) == kind()


def test_nested_values_are_taken() -> None:
    config = parse_config(
        ServiceConfig,
        {
            "model": {"source": "/models/x", "dtype": "float32"},
            "engine": {"kv_slots": 3},
            "remote_stages": ["medium", "small"],
        },
    )
    assert (config.model.source, config.model.dtype, config.engine.kv_slots) == ("/models/x", "float32", 3)
    assert config.remote_stages == ("small", "medium")  # the chain's order, whatever the file's
    assert parse_config(ServiceConfig, {"local_drafter": None}).local_drafter is None


@pytest.mark.parametrize(
    ("kind", "data", "names"),
    [
        pytest.param(ServiceConfig, {"modle": {}}, ["modle", "model", "engine", "max_replays"], id="unknown key"),
        pytest.param(ServiceConfig, {"engine": {"kv_slot": 4}}, ["engine.kv_slot", "4"], id="unknown nested key"),
        pytest.param(ServiceConfig, {"engine": {"kv_slots": 0}}, ["engine.kv_slots", "1", "got 0"], id="too small"),
        pytest.param(ServiceConfig, {"engine": {"max_nodes": 257}}, ["engine.max_nodes", "256", "257"], id="too large"),
        pytest.param(
            ServiceConfig, {"model": {"dtype": "fp8"}}, ["model.dtype", "bfloat16", "float32", "'fp8'"], id="no dtype"
        ),
        pytest.param(ServiceConfig, {"engine": {"kv_slots": "many"}}, ["engine.kv_slots", "'many'"], id="no number"),
        pytest.param(
            ServiceConfig, {"remote_stages": ["large"]}, ["remote_stages", "'large'", "small, medium"], id="stage"
        ),
        pytest.param(
            DraftersConfig, {"stages": [{**STAGE, "name": "tiny"}]}, ["stages.0", "'tiny'", "small, medium"], id="name"
        ),
        pytest.param(
            DraftersConfig,
            {"stages": [{**STAGE, "drafter": "eagle"}]},
            ["stages.0.drafter", "'eagle'", "sssd"],
            id="kind",
        ),
        pytest.param(DraftersConfig, {"stages": [{"name": "small"}]}, ["stages.0.drafter"], id="missing key"),
        pytest.param(DraftersConfig, {"stages": [STAGE, STAGE]}, ["stages", "differ", "small"], id="stage twice"),
        pytest.param(StageConfig, {**STAGE, "lease_ttl_s": 0}, ["lease_ttl_s", "greater than 0"], id="no lease"),
    ],
)
def test_a_refusal_names_key_value_and_what_is_allowed(
    kind: type[BaseModel], data: dict[str, object], names: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(kind, data)
    for name in names:
        assert name in str(caught.value)


def test_every_mistake_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(ServiceConfig, {"engine": {"kv_slots": 0, "max_rows": 1}, "max_replays": -1})
    for name in ("engine.kv_slots", "engine.max_rows", "max_replays"):
        assert name in str(caught.value)


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ServiceConfig().max_replays = 5

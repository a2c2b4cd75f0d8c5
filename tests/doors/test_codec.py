"""What the doors make of a request before it goes anywhere."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from cluster.core.errors import EngineUnavailable, InvalidArgument, NotFound
from cluster.core.types import ModelInfo
from cluster.tree_engine import check_request
from deployments.codec import MAX_MESSAGE, ClientRequest, Codec, public_message

INFO = ModelInfo("model", "Llama", 10, 32, "float32", "torch", True, (), "hash")


def encode(**asked: Any) -> Any:
    tokenizer: Any = None
    return asyncio.run(Codec(tokenizer, 60.0).encode(ClientRequest(**asked), INFO))


def test_a_request_is_for_the_model_it_was_encoded_for() -> None:
    request = encode(token_ids=(1, 2, 3))
    check_request(request, INFO)
    for other in (replace(INFO, model="its successor"), replace(INFO, tokenizer_hash="another")):
        with pytest.raises(EngineUnavailable, match="another model"):
            check_request(request, other)


def test_a_prompt_that_is_too_long_is_not_looked_at_token_by_token() -> None:
    with pytest.raises(InvalidArgument, match="33 tokens leave no room"):
        encode(token_ids=(99,) * 33)


def test_a_drawn_seed_survives_clients_whose_numbers_are_doubles() -> None:
    seeds = {encode(token_ids=(1,)).params.seed for _ in range(50)}
    assert len(seeds) == 50
    assert all(int(float(seed)) == seed for seed in seeds)


def test_what_a_client_wrote_comes_back_shortened() -> None:
    with pytest.raises(NotFound) as caught:
        encode(token_ids=(1,), model="x" * 100_000)
    assert len(public_message(caught.value, "id")) <= MAX_MESSAGE + 4
    assert public_message(InvalidArgument("seed", "is odd"), "id") == "seed: is odd"

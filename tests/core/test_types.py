"""What travels: refusals name the field the client used, digests and commits agree, everything survives pickling."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from cluster.core.errors import InvalidArgument
from cluster.core.types import (
    MAX_SEED,
    Commit,
    SamplingParams,
    Speculation,
    SpeculationStats,
    TreeKey,
    digest_of,
    tokenizer_hash,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -2),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop", ("x",) * 17),
        ("stop", ("",)),
        ("stop", ("x" * 1025,)),
        ("stop_token_ids", tuple(range(1025))),
        ("logit_bias", tuple((token, 1.0) for token in range(1025))),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, float("nan")),)),
    ],
)
def test_a_bad_sampling_parameter_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(
    "good",
    [
        {"temperature": 0.0, "top_p": 1e-9, "top_k": -1, "seed": 0},
        {"temperature": 100.0, "min_p": 1.0, "seed": MAX_SEED},
        {"max_tokens": 5, "min_tokens": 5, "stop": ("x",) * 16},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 2.0, "logit_bias": ((0, -100.0),)},
    ],
)
def test_sampling_parameters_are_good_up_to_their_bounds(good: dict[str, object]) -> None:
    SamplingParams(**good)  # type: ignore[arg-type]


def test_only_temperature_zero_is_greedy_and_only_penalties_look_back() -> None:
    assert SamplingParams(temperature=0.0).greedy
    assert not SamplingParams(temperature=1e-9).greedy
    assert not SamplingParams(logit_bias=((1, 2.0),), min_tokens=3).has_penalties
    for field in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert SamplingParams(**{field: 0.5}).has_penalties  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_nodes", -1), ("max_nodes", 257), ("stages", ("large",)), ("stages", ("small", "Medium"))],
)
def test_bad_speculation_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Speculation(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == f"speculation.{field}"


def test_the_mean_accepted_length_counts_every_token_of_every_round() -> None:
    assert SpeculationStats(rounds=4, accepted=6, tokens_by_origin=(4, 4, 2)).mean_accepted_length == 2.5
    assert SpeculationStats().mean_accepted_length == 0.0


def test_a_digest_does_not_depend_on_how_the_tokens_were_split() -> None:
    tokens = [5, 0, 49_151, 5, 2**31 - 1]
    whole = digest_of(tokens)
    assert 0 <= whole <= MAX_SEED
    for cut in range(len(tokens) + 1):
        assert digest_of(tokens[cut:], digest_of(tokens[:cut])) == whole
    assert digest_of(np.array(tokens, np.int32)) == whole


def test_digests_tell_equal_lengths_and_orders_apart() -> None:
    sequences = [(a, b, c) for a in range(20) for b in range(20) for c in range(20)]
    assert len({digest_of(sequence) for sequence in sequences}) == len(sequences)
    assert len({digest_of([0] * n) for n in range(50)}) == 50


def test_a_commit_ends_where_its_key_says() -> None:
    Commit(TreeKey("s", 0, 12, 1), 10, (4, 5))
    with pytest.raises(ValueError, match="does not end at 12"):
        Commit(TreeKey("s", 0, 12, 1), 10, (4,))


def test_a_tokenizers_hash_depends_on_ids_not_on_order() -> None:
    assert tokenizer_hash({"a": 0, "b": 1}) == tokenizer_hash({"b": 1, "a": 0})
    assert tokenizer_hash({"a": 0, "b": 1}) != tokenizer_hash({"a": 1, "b": 0})
    assert len(tokenizer_hash({"\ud800": 0})) == 16


def test_what_travels_survives_pickling() -> None:
    for value in (
        SamplingParams(seed=MAX_SEED),
        Speculation(stages=("small",)),
        Commit(TreeKey("s", 1, 1, 2), 0, (3,)),
    ):
        assert pickle.loads(pickle.dumps(value)) == value

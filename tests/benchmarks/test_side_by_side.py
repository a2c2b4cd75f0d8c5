"""The comparison without its peers: arguments, grouping, prompts, turns of scripted workers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import side_by_side
from benchmarks.comparison import Comparison, Plan
from benchmarks.engines import ENGINES, Family
from benchmarks.engines.base import Answer, Ask, Setup, Unavailable, peer_python, until_end
from benchmarks.engines.process import Worker
from benchmarks.prompts import Question, chunks, spread
from cluster.core.token_tree import TokenTree

QUESTIONS = [Question(index, "ab"[index % 2], (1, 2, index)) for index in range(6)]


def setup(**changes: Any) -> Setup:
    fields: dict[str, Any] = {
        "engines": ("plain",),
        "model": "",
        "gguf": None,
        "quantised": None,
        "peers": "",
        "eos_token_ids": (2,),
        "lengths": (3,),
        "max_tokens": 8,
        "max_model_len": 64,
        "max_concurrency": 2,
        "threads": 1,
        "address": None,
        "config": "",
    }
    return Setup(**{**fields, **changes})


def test_arguments_are_lists_and_all_names_every_engine() -> None:
    args = side_by_side.parse_args(
        ["--prompts", "p", "--engines", "vllm,plain,vllm", "--concurrency", "8,1", "--temperatures", "0,0.7"]
    )
    assert args.engines == ["vllm", "plain"]
    assert args.concurrency == [1, 8]
    assert args.temperatures == [0.0, 0.7]
    assert side_by_side.parse_args(["--prompts", "p", "--engines", "all"]).engines == list(ENGINES)


@pytest.mark.parametrize("wrong", [["--engines", "vlm"], ["--concurrency", "0"], ["--baseline", "x"], []])
def test_wrong_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        side_by_side.parse_args(wrong and ["--prompts", "p", *wrong])
    assert "error" in capsys.readouterr().err


def test_the_help_names_every_engine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        side_by_side.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ENGINES)


def test_engines_that_share_weights_share_a_worker() -> None:
    assert side_by_side.groups(["vllm", "plain", "vllm_ngram", "sssd", "service"]) == [
        ("vllm",),
        ("plain", "sssd"),
        ("vllm_ngram",),
        ("service",),
    ]


def test_prompts_are_taken_round_robin_over_the_categories() -> None:
    lines = [{"category": category, "n": n} for n, category in enumerate("aaabbc")]
    assert [line["n"] for line in spread(lines, 5)] == [0, 3, 5, 1, 4]
    assert len(spread(lines, None)) == 6


@pytest.mark.parametrize(
    ("count", "concurrency", "sizes"), [(10, 1, [4, 6]), (24, 8, [24]), (40, 8, [16, 24]), (2, 4, [2])]
)
def test_chunks_keep_the_sessions_busy_and_lose_no_prompt(count: int, concurrency: int, sizes: list[int]) -> None:
    questions = [Question(index, "a", (1,)) for index in range(count)]
    parts = chunks(questions, concurrency)
    assert [len(part) for part in parts] == sizes
    assert [question for part in parts for question in part] == questions


def test_a_setup_survives_its_way_to_the_worker() -> None:
    made = setup(engines=("vllm", "x"), lengths=(1, 2))
    fields = json.loads(json.dumps({name: getattr(made, name) for name in Setup.__slots__}))
    assert Setup.from_json(fields) == made


def test_an_answer_ends_with_its_end_of_text() -> None:
    assert until_end([5, 2, 7], [2]) == (5, 2)
    assert until_end([5, 6], [2]) == (5, 6)


def test_a_peer_without_an_environment_is_unavailable_and_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"setup_peers\.sh"):
        peer_python(str(tmp_path), "vllm")


def test_loading_goes_on_without_what_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "LOGS", tmp_path)
    notes: list[dict[str, Any]] = []
    loaded, versions = side_by_side.load(["vllm", "llama_cpp"], setup(peers=str(tmp_path)), [], notes.append)
    assert (loaded, versions) == ({}, {})
    assert [note["engine"] for note in notes] == ["vllm", "llama_cpp"]


def test_a_worker_that_cannot_load_says_why_and_ends(tmp_path: Path) -> None:
    worker = Worker(Family("llama_cpp"), setup(engines=("llama_cpp",)), tmp_path / "log")
    try:
        with pytest.raises(Unavailable, match="no GGUF"):
            worker.load()
        with pytest.raises(Unavailable, match="has ended"):
            worker.counters("llama_cpp")
    finally:
        worker.end()


class ScriptedWorker:
    """Answers each prompt with ``tokens``; ``failing`` after so many asks."""

    def __init__(self, *engines: str, tokens: tuple[int, ...] = (7, 8), failing: int = 1000) -> None:
        self.family = ENGINES[engines[0]].family
        self.engines = engines
        self.tokens = tokens
        self.asks: list[Ask] = []
        self.awake = False
        self._failing = failing

    def resume(self) -> None:
        self.awake = True

    def pause(self) -> None:
        self.awake = False

    def generate(self, ask: Ask) -> list[Answer]:
        assert self.awake
        self.asks.append(ask)
        if len(self.asks) > self._failing:
            raise Unavailable("gone")
        return [Answer(prompt.index, self.tokens, 0.5, 2) for prompt in ask.prompts]

    def counters(self, engine: str) -> dict[str, float]:
        return {"steps": float(len(self.asks))}

    def probe(self) -> dict[str, Any]:
        return {}

    def peak_rss_mb(self) -> float:
        return 12.0


def compare(
    workers: dict[str, Any], runs: int = 2, concurrencies: tuple[int, ...] = (1,)
) -> tuple[Comparison, list[Any]]:
    records: list[dict[str, Any]] = []
    # Workers only play their part in how engines take turns.
    comparison = Comparison(Plan(QUESTIONS, runs, 8, concurrencies, (0.0,)), workers, records.append)
    for run in range(runs):
        comparison.run(run)
    return comparison, records


def test_every_engine_answers_every_prompt_in_every_run_and_the_order_rotates() -> None:
    workers = {name: ScriptedWorker(name) for name in ("vllm", "llama_cpp", "transformers")}
    _, records = compare(dict(workers))
    answers = [(record["engine"], record["run"], record["prompt"]) for record in records if record["kind"] == "answer"]
    assert sorted(answers) == sorted((name, run, index) for name in workers for run in range(2) for index in range(6))
    turns = [record["engine"] for record in records if record["kind"] == "chunk"]
    assert turns[0] != turns[3]
    assert not any(worker.awake for worker in workers.values())
    assert [record["counters"] for record in records if record["kind"] == "chunk"] == [{"steps": 1.0}] * 6


def test_what_one_turn_learnt_must_not_serve_the_next() -> None:
    worker = ScriptedWorker("vllm")
    compare({"vllm": worker}, runs=2, concurrencies=(1, 2))
    assert len({ask.salt for ask in worker.asks}) == len(worker.asks) == 4


def test_an_engine_is_left_out_where_it_cannot_run_so_many_sessions() -> None:
    workers = {name: ScriptedWorker(name) for name in ("vllm", "llama_cpp")}
    compare(dict(workers), runs=1, concurrencies=(1, 4))
    assert [ask.concurrency for ask in workers["vllm"].asks] == [1, 4]
    assert [ask.concurrency for ask in workers["llama_cpp"].asks] == [1]


def test_engines_that_fail_are_reported_and_the_others_go_on() -> None:
    shared = ScriptedWorker("plain", "sssd", failing=1)
    other = ScriptedWorker("vllm")
    _, records = compare({"plain": shared, "sssd": shared, "vllm": other})
    assert {record["engine"] for record in records if record["kind"] == "unavailable"} == {"plain", "sssd"}
    assert len(other.asks) == 2


def test_ids_of_ours_that_differ_are_an_error_and_a_peers_are_not() -> None:
    workers = {
        "plain": ScriptedWorker("plain"),
        "sssd": ScriptedWorker("sssd", tokens=(7, 9)),
        "vllm": ScriptedWorker("vllm", tokens=(1,)),
    }
    comparison, records = compare(dict(workers), runs=1)
    assert len(comparison.mismatches) == len(QUESTIONS)
    assert all("from token 1" in text and "vllm" not in text for text in comparison.mismatches)
    assert sum(record["kind"] == "mismatch" for record in records) == len(QUESTIONS)


def test_the_wrong_drafter_proposes_sound_trees_of_the_size_it_may() -> None:
    from benchmarks.engines.always_wrong import AlwaysWrong
    from drafters.base import Ask as DraftAsk

    trees = AlwaysWrong(100).propose([DraftAsk("s", 7, 3), DraftAsk("t", 1, 5)], {})
    assert [len(trees[name]) for name in "st"] == [7, 1]
    tree: TokenTree = trees["s"]
    tree.check(100, max_depth=3)
    assert tree.scores.min() == 1.0

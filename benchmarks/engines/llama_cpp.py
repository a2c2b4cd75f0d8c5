"""llama.cpp through llama-cpp-python, compiled for this machine, on the same weights as bf16 GGUF, or on the file they
come from, with which it rounds what it multiplies to eight bits.

The binding decodes one sequence at a time; llama.cpp's server, which batches, is not part of it.
"""

from __future__ import annotations

import importlib.metadata
import time
from itertools import islice
from typing import Any

from benchmarks.engines.base import Answer, Ask, Defaults, Setup, Unavailable, until_end

LOOKUP_TOKENS = 2  # what its documentation advises for CPUs; faster here than the default of 10


class Loaded(Defaults):
    def __init__(self, setup: Setup) -> None:
        if setup.gguf is None:
            raise Unavailable("the model has no GGUF: --model must be a .gguf file or a package that ships one")
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        class CountingLlama(Llama):  # type: ignore[misc]
            """Counts its forward passes: the rounds of prompt lookup."""

            passes = 0

            def eval(self, tokens: Any) -> None:
                self.passes += 1
                super().eval(tokens)

        (name,) = setup.engines
        lookup = LlamaPromptLookupDecoding(num_pred_tokens=LOOKUP_TOKENS) if name == "llama_cpp_lookup" else None
        self._setup = setup
        self._llama = CountingLlama(
            setup.quantised if name == "llama_cpp_quantised" else setup.gguf,
            n_ctx=setup.max_model_len,
            n_threads=setup.threads,
            n_threads_batch=setup.threads,
            draft_model=lookup,
            logits_all=lookup is not None,  # a draft model implies it, but the room for them is made only if it is said
            verbose=False,
        )
        self.versions = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}

    def generate(self, ask: Ask) -> list[Answer]:
        answers: list[Answer] = []
        for prompt in ask.prompts:
            self._llama.set_seed(prompt.index)
            start, before = time.perf_counter(), self._llama.passes
            stream = self._llama.generate(
                list(prompt.token_ids), temp=ask.temperature, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0
            )
            token_ids: list[int] = []
            for token in islice(stream, ask.max_tokens):
                token_ids.append(int(token))
                if token in self._setup.eos_token_ids:
                    break
            seconds = time.perf_counter() - start
            ids = until_end(token_ids, self._setup.eos_token_ids)
            answers.append(Answer(prompt.index, ids, seconds, self._llama.passes - before))
        return answers

"""The engines that can be compared, by name. Adding one: a name here, and a class with ``base.Engine``'s methods.

Each family is a module of this package with a class ``Loaded``, and where its workers need special environment
variables a function ``environment``. Modules import what they wrap inside functions only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """``peer``: the virtual environment its workers run in, none for this project's own.

    ``one_worker``: its engines share one process, and with it the weights. ``cluster``: the worker is only a client of
    processes outside its session. ``ours``: its engines promise the same token ids as plain decoding.
    """

    module: str
    peer: str | None = None
    one_worker: bool = False
    cluster: bool = False
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """One engine. ``max_concurrency``: sessions it can run at once, None for any number."""

    family: Family
    meaning: str
    max_concurrency: int | None = None


OURS = Family("ours", one_worker=True, ours=True)
SERVICE = Family("service", one_worker=True, cluster=True, ours=True)
TRANSFORMERS = Family("transformers")
VLLM = Family("vllm", peer="vllm")
VLLM_PACELINE = Family("vllm", peer="vllm", cluster=True)
LLAMA_CPP = Family("llama_cpp", peer="llama_cpp")

ENGINES = {
    "plain": Kind(OURS, "this engine, one token a step"),
    "sssd": Kind(OURS, "this engine, n-gram drafter"),
    "swift": Kind(OURS, "this engine, drafting with the target's own layers"),
    "s3d": Kind(OURS, "this engine, masks through the target's outer layers"),
    "mlp_speculator": Kind(OURS, "this engine, a network on the target's hidden states"),
    "staged": Kind(OURS, "this engine, n-gram guesses checked and extended by that network"),
    "staged_s3d": Kind(OURS, "this engine, n-gram guesses checked and extended by the target's outer layers"),
    "always_wrong": Kind(OURS, "this engine, a drafter that is sure of rubbish: the bound on what guessing can cost"),
    "service": Kind(SERVICE, "the deployed service, gRPC streaming"),
    "service_plain": Kind(SERVICE, "the same, speculation off in every request"),
    "transformers": Kind(TRANSFORMERS, "transformers generate, eager; batches padded to the left"),
    "transformers_lookup": Kind(TRANSFORMERS, "transformers generate with prompt_lookup_num_tokens", 1),
    "transformers_compiled": Kind(TRANSFORMERS, "transformers generate, static cache and torch.compile", 1),
    "vllm": Kind(VLLM, "vLLM-CPU, compiled"),
    "vllm_ngram": Kind(VLLM, "vLLM-CPU, n-gram speculation"),
    "vllm_suffix": Kind(VLLM, "vLLM-CPU, suffix decoding (arctic-inference)"),
    "vllm_paceline_local": Kind(VLLM, "vLLM-CPU, this project's n-gram drafter in its process"),
    "vllm_paceline_remote": Kind(VLLM_PACELINE, "vLLM-CPU, this project's draft workers over Ray, as far as they pay"),
    "vllm_paceline": Kind(VLLM_PACELINE, "vLLM-CPU, the better of both"),
    "llama_cpp": Kind(LLAMA_CPP, "llama.cpp through llama-cpp-python", 1),
    "llama_cpp_lookup": Kind(LLAMA_CPP, "llama-cpp-python with LlamaPromptLookupDecoding", 1),
    "llama_cpp_quantised": Kind(LLAMA_CPP, "llama.cpp on the file's own four and eight bits, whose text is another", 1),
}

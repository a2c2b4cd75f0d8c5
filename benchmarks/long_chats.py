"""The same questions as they are and behind a long chat, to see what a long context does to n-gram guesses.

    python -m benchmarks.offline --prompts PROMPTS.jsonl --out ANSWERS.jsonl --max-tokens 128 --concurrency 8
    python -m benchmarks.long_chats --prompts PROMPTS.jsonl --answers ANSWERS.jsonl --limit 26 --out LONG.jsonl
    python -m benchmarks.offline --prompts LONG.jsonl --out OUT.jsonl --max-model-len 8192 --max-rows 256
    python -m benchmarks.accepted_length --outputs OUT.jsonl --prompts LONG.jsonl --store FOLDER

The chat is of other questions and the model's own answers to them. The category of a line says which form it has.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.offline import read_lines
from benchmarks.prompts import spread

Message = dict[str, str]


def chat_before(
    question: int, asked: Sequence[str], answers: Sequence[dict[str, Any]], num_tokens: int
) -> list[Message]:
    """Turns about other questions, in random order, of ``num_tokens`` at most."""
    others = [index for index in range(len(asked)) if index != question]
    random.Random(question).shuffle(others)
    chat: list[Message] = []
    for index in others:
        size = len(answers[index]["prompt_token_ids"]) + len(answers[index]["token_ids"])
        if size <= num_tokens:
            num_tokens -= size
            chat += [_said("user", asked[index]), _said("assistant", answers[index]["text"])]
    return chat


def both_forms(
    asked: Sequence[str], answers: Sequence[dict[str, Any]], chosen: Sequence[int], num_tokens: int
) -> list[dict[str, Any]]:
    """Lines for ``benchmarks.offline``."""
    forms = {"as they are": 0, f"behind a chat of {num_tokens} tokens": num_tokens}
    return [
        {
            "category": name,
            "question_id": index,
            "messages": [*chat_before(index, asked, answers, size), _said("user", asked[index])],
        }
        for name, size in forms.items()
        for index in chosen
    ]


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="lines with turns; the first is the question")
    parser.add_argument("--answers", type=Path, required=True, help="what benchmarks.offline made of all of them")
    parser.add_argument("--limit", type=int, default=26, help="questions, spread over the categories")
    parser.add_argument("--history-tokens", type=int, default=7000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    lines = [{**line, "index": index} for index, line in enumerate(read_lines(args.prompts, None))]
    by_index = {int(answer["id"].split("-")[0]): answer for answer in read_lines(args.answers, None)}
    if missing := [line["index"] for line in lines if line["index"] not in by_index]:
        parser.error(
            f"--answers: {args.answers} has none for {len(missing)} prompts, the first is line {missing[0] + 1}"
        )
    asked = [line["turns"][0] for line in lines]
    chosen = [line["index"] for line in spread(lines, args.limit)]
    made = both_forms(asked, [by_index[index] for index in range(len(lines))], chosen, args.history_tokens)
    args.out.write_text("".join(json.dumps(line) + "\n" for line in made))
    print(f"{len(made)} prompts: {', '.join(dict.fromkeys(line['category'] for line in made))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

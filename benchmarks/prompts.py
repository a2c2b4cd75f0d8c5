"""The prompts of a comparison: read, spread over the categories, tokenised once for every engine."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks import offline

NO_CATEGORY = "all"


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt; ``index`` is its place in the comparison."""

    index: int
    category: str
    token_ids: tuple[int, ...]


def load_questions(path: Path, limit: int | None, tokenizer: Any, max_prompt: int) -> list[Question]:
    """First turns of ``path`` as token ids, cut to their last ``max_prompt``; any form ``benchmarks.offline`` reads."""
    questions = []
    for index, line in enumerate(spread(offline.read_lines(path, None), limit)):
        ids = offline.prompt_ids(line, tokenizer)
        if len(ids) > max_prompt:
            print(f"prompt {index}: cut from {len(ids)} to its last {max_prompt} tokens", file=sys.stderr)
        questions.append(Question(index, str(line.get("category", NO_CATEGORY)), tuple(ids[-max_prompt:])))
    return questions


def spread(lines: Sequence[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """The first line of each category, then the second of each, and so on; ``limit`` of them."""
    by_category: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_category[str(line.get("category", NO_CATEGORY))].append(line)
    turns = zip_longest(*by_category.values())
    return [line for turn in turns for line in turn if line is not None][:limit]


def chunks(questions: Sequence[Question], concurrency: int) -> list[list[Question]]:
    """Parts that one engine answers before the next has its turn.

    Short, so that engines meet the same conditions, but long enough for ``concurrency`` sessions to be under way most
    of the time: at least 4 prompts and twice the concurrency; what is left over joins the last part.
    """
    size = max(4, 2 * concurrency)
    count = max(1, len(questions) // size)
    ends = [*(size * part for part in range(1, count)), len(questions)]
    return [list(questions[start:end]) for start, end in zip([0, *ends], ends)]

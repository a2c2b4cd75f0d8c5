"""Which tokens a target says most: the part of the vocabulary a small drafter's head needs to know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def frequent_tokens(chats: Sequence[Path], vocab_size: int, count: int) -> list[int]:
    """The ``count`` tokens most frequent in the target's own replies, by rising id; ties go to the lower id.

    chats: files ``self_generate`` wrote. Tokens that never occur fill up from the lowest id, which in a vocabulary of
    merges is the commonest.
    """
    seen = np.zeros(vocab_size, np.int64)
    for path in chats:
        with path.open() as lines:
            for line in lines:
                chat = json.loads(line)
                for start, end in chat["replies"]:
                    seen += np.bincount(chat["token_ids"][start:end], minlength=vocab_size)
    best = np.argsort(-seen, kind="stable")[:count]
    return sorted(int(token) for token in best)

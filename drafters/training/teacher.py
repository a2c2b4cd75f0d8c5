"""What trainers of drafters share: chats in pieces, batches of them, and the target's hidden states, computed once."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WARM_UP = 50  # steps


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a chat: its tokens, where they stand in the cache of hidden states, and which are the target's."""

    start: int
    tokens: list[int]
    own: list[bool]


def read_pieces(paths: Sequence[Path], longest: int, most: int | None) -> list[Piece]:
    """Chats in stretches of at most ``longest`` tokens, in file order, up to about ``most`` tokens."""
    pieces: list[Piece] = []
    start = 0
    for path in paths:
        with path.open() as lines:
            for line in lines:
                if most is not None and start >= most:
                    return pieces
                chat = json.loads(line)
                tokens, own = chat["token_ids"], [False] * len(chat["token_ids"])
                for first, end in chat["replies"]:
                    own[first:end] = [True] * (end - first)
                for at in range(0, len(tokens), longest):
                    piece = tokens[at : at + longest]
                    if len(piece) > 1:
                        pieces.append(Piece(start, piece, own[at : at + longest]))
                    start += len(piece)
    return pieces


def batches(pieces: Sequence[Piece], size: int, draw: random.Random) -> list[list[Piece]]:
    """One epoch: pieces of like length together, about ``size`` tokens a batch, padding included, in random order."""
    order = sorted(pieces, key=lambda piece: (len(piece.tokens) // 32, draw.random()))
    result: list[list[Piece]] = [[]]
    for piece in order:
        batch = result[-1]
        if batch and (len(batch) + 1) * max(len(piece.tokens), *(len(other.tokens) for other in batch)) > size:
            batch = []
            result.append(batch)
        batch.append(piece)
    draw.shuffle(result)
    return result


def schedule(pieces: Sequence[Piece], size: int, epochs: int, seed: int) -> list[list[Piece]]:
    """The batches of all epochs, in the order of training: step i is the i-th, whenever it is taken."""
    return [batch for epoch in range(epochs) for batch in batches(pieces, size, random.Random(f"{seed}/{epoch}"))]


class Teacher:
    """The target's last hidden states, computed once per piece and kept in a file."""

    def __init__(self, target: Any, folder: Path, num_tokens: int) -> None:
        self._body = target.model
        shape = (num_tokens, target.config.hidden_size)
        path, done = folder / "hidden.bin", folder / "done.bin"
        fresh = not path.is_file()
        self._hidden = np.memmap(path, np.int16, "w+" if fresh else "r+", shape=shape)
        self._done = np.memmap(done, np.bool_, "w+" if fresh else "r+", shape=(num_tokens,))

    @torch.inference_mode()
    def hidden(self, batch: Sequence[Piece], ids: Tensor) -> list[Tensor]:
        """(len, hidden) bf16 for each piece of the batch, whose padded ids are given."""
        if not all(self._done[piece.start] for piece in batch):
            states = self._body(input_ids=ids, use_cache=False).last_hidden_state.to(torch.bfloat16)
            for piece, rows in zip(batch, states):
                end = piece.start + len(piece.tokens)
                self._hidden[piece.start : end] = rows[: len(piece.tokens)].view(torch.int16).numpy()
                self._done[piece.start] = True
        return [
            torch.from_numpy(self._hidden[piece.start : piece.start + len(piece.tokens)].copy()).view(torch.bfloat16)
            for piece in batch
        ]


def padded(batch: Sequence[Piece]) -> Tensor:
    """(pieces, longest) token ids; what stands behind a piece's end is never looked at."""
    longest = max(len(piece.tokens) for piece in batch)
    return torch.tensor([piece.tokens + [0] * (longest - len(piece.tokens)) for piece in batch])


def rate(step: int, num_steps: int) -> float:
    """The learning rate's factor: a linear rise, then a cosine down to a twentieth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, num_steps - WARM_UP)
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done))

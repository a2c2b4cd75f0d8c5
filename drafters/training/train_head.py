"""Trains the small network that guesses on from a target's hidden states (``drafters/mlp_head.py``).

    python -m drafters.training.self_generate --out chats.jsonl --tokens 2_000_000
    python -m drafters.training.train_head --chats chats.jsonl --out mlp_head

The target itself wrote the chats. From many places of them the network is let go ``--depth`` steps on its own states,
given the tokens that follow, as it will be in service; the loss is the divergence from the target's own distribution
at each step. The target is frozen and run once over each chat: its hidden states are kept in WORK and serve later
epochs. A run that is broken off goes on where it last saved; --out always holds the latest save.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafters.mlp_head import HeadHeader, MlpHead, save_head
from drafters.training.teacher import Piece, padded
from drafters.training.trainer import Trainer, add_arguments, command

STEP_WEIGHT = 0.8  # of each further step of the network in the loss


class HeadTrainer(Trainer):
    """The network alone is trained; what it starts from and aims at is the target's."""

    weight_decay = 0.01

    @property
    def ahead(self) -> int:
        return int(self.args.depth)

    def shape(self) -> dict[str, Any]:
        args = self.args
        return {"blocks": args.blocks, "inner": self._inner, "depth": args.depth}

    def build(self) -> MlpHead:
        config = self.target.config
        self._embedding = self.target.get_input_embeddings().weight
        return MlpHead(config.hidden_size, self._inner, self.args.blocks, config.rms_norm_eps)

    def loss(self, batch: Sequence[Piece]) -> Tensor:
        tokens, hidden, starts = self._places(batch)
        chosen = starts[torch.rand(len(starts)) < self.args.places]
        if not len(chosen):  # few places, none drawn: the mean over none would be NaN, and so all weights from then on
            chosen = starts[torch.randint(len(starts), (1,))]
        with torch.no_grad():
            expected = nn.functional.linear(hidden, self.head).float().log_softmax(-1)
        loss, weights = torch.zeros(()), 0.0
        for ahead, states in self._walk(tokens, hidden, chosen):
            said, weight = self._logits(states).float().log_softmax(-1), STEP_WEIGHT ** (ahead - 1)
            step = nn.functional.kl_div(said, expected[chosen + ahead], reduction="batchmean", log_target=True)
            loss, weights = loss + weight * step, weights + weight
        return loss / weights

    def hits(self, batch: Sequence[Piece]) -> list[Tensor]:
        tokens, hidden, starts = self._places(batch)
        own = torch.tensor([flag for piece in batch for flag in piece.own])
        starts = starts[own[starts + 1]]
        said = nn.functional.linear(hidden, self.whole_head).argmax(-1)
        return [
            self.head_tokens[self._logits(states).argmax(-1)] == said[starts + ahead]
            for ahead, states in self._walk(tokens, hidden, starts)
        ]

    def export(self, out: Path, tokenizer_hash: str, reached: dict[str, Any]) -> None:
        config, args = self.target.config, self.args
        shape = (config.hidden_size, self._inner, args.blocks, config.rms_norm_eps)
        save_head(out, HeadHeader(tokenizer_hash, *shape, args.depth, reached), self.module, self.head_tokens)

    @property
    def _inner(self) -> int:
        return int(self.args.inner or self.target.config.intermediate_size)

    def _places(self, batch: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens of the batch in a row, the target's hidden states behind them, and where walks can start."""
        hidden = torch.cat(self.teacher.hidden(batch, padded(batch)))
        tokens = torch.tensor([token for piece in batch for token in piece.tokens])
        starts: list[Tensor] = []
        at = 0
        for piece in batch:
            starts.append(torch.arange(at, at + len(piece.tokens) - self.args.depth))  # longer than that, each
            at += len(piece.tokens)
        return tokens, hidden, torch.cat(starts)

    def _walk(self, tokens: Tensor, hidden: Tensor, starts: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(steps taken, states) behind 1, 2, ... ``depth`` further tokens from each start."""
        states = hidden[starts]
        for ahead in range(1, self.args.depth + 1):
            with torch.autocast("cpu", torch.bfloat16):
                states = self.module(states, self._embedding[tokens[starts + ahead]])
            yield ahead, states

    def _logits(self, states: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.linear(self.module.final_norm(states), self.head)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--inner", type=int, default=0, help="width of a block; 0: that of the target's MLP")
    parser.add_argument("--depth", type=int, default=4, help="steps on its own states in training")
    parser.add_argument("--places", type=float, default=0.5, help="share of a text's places walked from in an epoch")
    args = parser.parse_args(argv)
    for name, least in (("blocks", 1), ("inner", 0), ("depth", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name}: {getattr(args, name)} is not allowed; allowed: {least} and more")
    return command(HeadTrainer, args)


if __name__ == "__main__":
    raise SystemExit(main())

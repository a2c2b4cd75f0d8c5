"""Train S3D's masks and adapters for a target, on text the target wrote itself.

    python -m drafters.training.self_generate --out chats.jsonl --tokens 1_300_000
    python -m drafters.training.train_s3d --chats chats.jsonl --out my-s3d
    # then, under a stage:  drafter: s3d, options: {adapter: my-s3d}

The target stays frozen: what is trained is used by draft passes alone, so the target's output cannot change. In each
step some chats run through the target, and groups of masks behind random tokens of its replies learn to guess what
comes (``s3d_model.py``). ``--out`` holds a usable adapter from the first save on: a running average of the steps so
far, the better the longer it runs. A run that is broken off goes on where it was saved, also towards more ``--steps``.
Another run's state in ``--out`` is refused. ``--start`` begins with another adapter's masks and layers, say of one that
keeps more layers.

A 135M target on two free cores takes about two seconds a step, and 2,000 steps are once through 1.3 M tokens. On a GPU
``--device cuda --chats-per-step 16`` is another matter of minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from cluster.core.config import ModelConfig
from cluster.core.errors import ConfigError
from cluster.engine.kernels import DTYPES
from cluster.engine.weights import load_weights, read_config, resolve_model
from drafters.s3d_adapter import S3DAdapter, S3DHeader, S3DShape, find_adapter
from drafters.shipped import tokenizer_of
from drafters.training.claims import model_digest, refuse_others, text_digest
from drafters.training.s3d_model import TwoStream, loss_of

STATE = "training.pt"
WARM_UP = 20
CLIP = 1.0
EXAM_SHARE = 4  # a chat held out is measured at one of so many ``--groups``
AVERAGED = 5.0  # the average spans about the last fifth of the steps


@dataclass(frozen=True, slots=True)
class Chat:
    """A text of the target's and the positions behind which a whole group lies within one of its replies."""

    tokens: torch.Tensor
    places: list[int]

    def cut(self, draw: random.Random, groups: int, gamma: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The text up to the last of ``groups`` places drawn, and the places: (n,) and (g,)."""
        starts = sorted(draw.sample(self.places, min(groups, len(self.places))))
        return self.tokens[: starts[-1] + gamma + 1], torch.tensor(starts, device=self.tokens.device)


def read_chats(paths: Sequence[Path], gamma: int, max_tokens: int, device: str) -> list[Chat]:
    """Chats ``self_generate`` wrote, cut to ``max_tokens``; those without room for a group are left out."""
    chats: list[Chat] = []
    for path in paths:
        for line in path.read_text().splitlines():
            chat = json.loads(line)
            tokens = chat["token_ids"][:max_tokens]
            spans = [(start, min(end, len(tokens))) for start, end in chat["replies"]]
            places = [place for start, end in spans for place in range(start - 1, end - gamma)]
            if places:
                chats.append(Chat(torch.tensor(tokens, device=device), places))
    return chats


class Trainer:
    """The model, its optimizer and the running average. ``step``: steps done; own: whose states it saves and loads."""

    def __init__(self, model: TwoStream, args: argparse.Namespace, own: Mapping[str, Any]) -> None:
        self.step = 0
        self._own = dict(own)
        self.average = {name: value.detach().clone() for name, value in model.trained.items()}
        self._model, self._args = model, args
        self._optimizer = torch.optim.Adam(model.trained.values(), lr=args.lr, betas=(0.9, 0.98))

    def train(self, chats: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """One step over these (tokens, starts). Returns the mean loss."""
        total = 0.0
        for tokens, starts in chats:
            loss, _ = loss_of(self._model, tokens, starts, self._args.decay)
            (loss / len(chats)).backward()  # type: ignore[no-untyped-call]
            total += loss.item() / len(chats)
        self._optimizer.param_groups[0]["lr"] = self._args.lr * min(1.0, (self.step + 1) / WARM_UP)
        torch.nn.utils.clip_grad_norm_(self._model.trained.values(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        with torch.no_grad():
            for name, value in self.average.items():
                value.lerp_(self._model.trained[name], min(1.0, AVERAGED / self.step))
        return total

    @torch.no_grad()
    def agreement(self, chats: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
        """Share of groups whose likeliest guess is the text's token, by position, with the averaged parameters."""
        own = {name: value.detach().clone() for name, value in self._model.trained.items()}
        self._swap(self.average)
        hits = torch.zeros(self._args.gamma)
        for tokens, starts in chats:
            _, logits = loss_of(self._model, tokens, starts, self._args.decay)
            truth = tokens[starts[:, None] + 1 + torch.arange(self._args.gamma, device=tokens.device)]
            hits += (logits.argmax(-1) == truth).float().mean(0).cpu()
        self._swap(own)
        return [round(float(share), 4) for share in hits / len(chats)]

    def save(self, path: Path) -> None:
        state = {
            "run": self._own,
            "step": self.step,
            "trained": self._model.trained,
            "average": self.average,
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Go on where ``path`` was saved. Raises ``ConfigError`` where that was another run."""
        state = torch.load(path, weights_only=True, map_location=self._args.device)
        refuse_others(f"--out: {path.parent}", state.get("run", {}), self._own)
        self.step, self.average = state["step"], state["average"]
        self._swap(state["trained"])
        self._optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def start_from(self, adapter: S3DAdapter) -> None:
        """Take over the masks, and the layers both keep. Raises ``ConfigError`` where their sizes differ."""
        known = {name: value for name, value in adapter.tensors.items() if name in self.average}
        differing = sorted(name for name, value in known.items() if value.shape != self.average[name].shape)
        if differing:
            raise ConfigError(f"start: {differing[0]} has another size there; allowed: the same --gamma and --rank")
        for values in (self._model.trained, self.average):
            for name, value in known.items():
                values[name].copy_(value)

    @torch.no_grad()
    def _swap(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in self._model.trained.items():
            value.copy_(values[name])


def batches(chats: Sequence[Chat], args: argparse.Namespace, first: int) -> Iterator[list[Any]]:
    """What steps ``first``, ``first + 1``, ... train on: a function of the step and the seed alone."""
    order, epoch = list(range(len(chats))), -1
    for step in count(first):
        batch = []
        for place in range(step * args.chats_per_step, (step + 1) * args.chats_per_step):
            if place // len(chats) != epoch:
                epoch = place // len(chats)
                order = random.Random(f"{args.seed}/{epoch}").sample(range(len(chats)), len(chats))
            draw = random.Random(f"{args.seed}/{epoch}/{place}")
            batch.append(chats[order[place % len(chats)]].cut(draw, args.groups, args.gamma))
        yield batch


def run(trainer: Trainer, chats: list[Chat], header: S3DHeader, args: argparse.Namespace) -> S3DHeader:
    """Train up to ``args.steps``, saving on the way. Returns the header of the last adapter written."""
    unseen, seen = chats[: args.held_out], chats[args.held_out :]
    exam = [chat.cut(random.Random(index), args.groups // EXAM_SHARE, args.gamma) for index, chat in enumerate(unseen)]
    start, before, losses = time.monotonic(), trainer.step, []
    for batch in batches(seen, args, trainer.step):
        if trainer.step >= args.steps:
            break
        losses.append(trainer.train(batch))
        if trainer.step % args.save_every and trainer.step < args.steps:
            continue
        loss, losses = sum(losses) / len(losses), []
        agreement = trainer.agreement(exam)
        rate = (trainer.step - before) / (time.monotonic() - start)
        left = (args.steps - trainer.step) / rate / 60
        print(
            f"step {trainer.step:,} of {args.steps:,}: loss {loss:.3f}, agreement {agreement},"
            f" {1 / rate:.1f} s a step, {left:.0f} min left",
            file=sys.stderr,
            flush=True,
        )
        made = {**header.provenance, "steps": trainer.step, "loss": round(loss, 4), "agreement": agreement}
        header = S3DHeader(header.vocab_size, header.tokenizer_hash, header.shape, made)
        trainer.save(args.out / STATE)
        S3DAdapter(header, trainer.average).save(args.out)
    return header


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ModelConfig().source, help="folder, .gguf, hub id or pypi:PACKAGE")
    parser.add_argument("--chats", type=Path, nargs="+", required=True, help="JSON lines of self_generate")
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter; goes on where it was saved")
    parser.add_argument("--start", default="", help="folder of an adapter to begin with, or default: the shipped one")
    parser.add_argument("--bottom", type=int, default=8, help="layers kept at the input")
    parser.add_argument("--top", type=int, default=8, help="layers kept at the output")
    parser.add_argument("--gamma", type=int, default=4, help="tokens guessed in one pass; fewer may be asked for later")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--head-size", type=int, default=16_384, help="first tokens of the vocabulary that are guessed")
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--chats-per-step", type=int, default=1)
    parser.add_argument("--groups", type=int, default=160, help="of masks in one chat")
    parser.add_argument("--max-tokens", type=int, default=768, help="of a chat; the rest is left out")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--decay", type=float, default=0.8, help="weight of a guess against that of the one before")
    parser.add_argument("--held-out", type=int, default=24, help="first chats of the files: for measuring only")
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    for name, least in (("gamma", 1), ("rank", 1), ("groups", EXAM_SHARE), ("held_out", 1)):
        if getattr(args, name) < least:
            option = name.replace("_", "-")
            parser.error(f"--{option}: {getattr(args, name)} is not allowed; allowed: {least} and more")
    if args.start and (args.out / STATE).is_file():
        parser.error(
            f"--start: {args.out} holds a run, which goes on from its own state; allowed: none, or a new --out"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = resolve_model(args.model, lambda line: print(line, file=sys.stderr))
    config = read_config(folder)
    if min(args.bottom, args.top) < 1 or args.bottom + args.top > config.num_layers:
        parser.error(f"--bottom, --top: {args.bottom} + {args.top} of {config.num_layers} layers; at least 1 each")
    shape = S3DShape(
        config.num_layers, args.bottom, args.top, args.gamma, args.rank, min(args.head_size, config.vocab_size)
    )
    weights = {name: value.to(args.device) for name, value in load_weights(folder, config, DTYPES[args.dtype]).items()}
    chats = read_chats(args.chats, args.gamma, args.max_tokens, args.device)
    if len(chats) <= args.held_out:
        parser.error(f"--chats: {len(chats)} chats with room for a group; needed: more than {args.held_out}, held out")
    own = {
        "model": model_digest(folder),
        "text": text_digest([*chat.places, -1, *chat.tokens.tolist()] for chat in chats),
        "shape": asdict(shape),
        "seed": args.seed,
        "number of chats per step": args.chats_per_step,
        "number of groups": args.groups,
        "number of chats held out": args.held_out,
    }
    trainer = Trainer(TwoStream(config, weights, shape), args, own)
    if (args.out / STATE).is_file():
        trainer.load(args.out / STATE)
    elif args.start:
        trainer.start_from(S3DAdapter.load(find_adapter(args.start, config, folder), config, tokenizer_of(folder)))
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("chats", "out")}
    settings["chats"] = ", ".join(path.name for path in args.chats)
    header = S3DHeader(config.vocab_size, tokenizer_of(folder), shape, {"settings": settings})
    header = run(trainer, chats, header, args)
    print(json.dumps({"steps": trainer.step, **header.provenance}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

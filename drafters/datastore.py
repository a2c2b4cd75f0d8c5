"""``Datastore``: text of many documents with its suffix array, so that "what followed this?" is a binary search.

A store is a folder: ``text.bin`` (token ids, two bytes each where the vocabulary fits, unsigned; else four),
``header.json`` (``StoreHeader``) and, unless it is left to be made where the store is used, ``index.bin``. Everything
is memory-mapped and never written to once it is there. A document ends with the id ``vocab_size``, which no text
contains, so that no continuation runs into the next document. ``docs/datastore.md`` has the whole picture.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.core.disk_cache import cache_folder
from cluster.core.errors import ConfigError
from drafters.suffix_array import suffix_array

log = logging.getLogger(__name__)

FORMAT = 1
TEXT, INDEX, HEADER = "text.bin", "index.bin", "header.json"
NUM_COMMON = 64  # ids that are offered where nothing matches

Int32Array = npt.NDArray[np.int32]
Range = tuple[int, int]
"""Ranks [low, high) of the suffixes that begin with some run of tokens."""


@dataclass(frozen=True, slots=True)
class StoreHeader:
    """What a store was made of and for. ``digest`` names its text; ``provenance`` is free-form."""

    vocab_size: int
    tokenizer_hash: str
    num_tokens: int
    num_documents: int
    digest: str
    provenance: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> StoreHeader:
        """Raises ``ConfigError`` where ``folder`` holds no store of this format."""
        try:
            fields = json.loads((folder / HEADER).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"store: {folder} is not a datastore: {error}") from None
        if fields.get("format") != FORMAT:
            raise ConfigError(f"store: {folder} has format {fields.get('format')}, this version reads {FORMAT}")
        return cls(**fields)

    def check(self, where: Path, vocab_size: int, tokenizer_hash: str | None) -> None:
        """Raises ``ConfigError`` naming both sides where the store is of another vocabulary than the target's."""
        if self.vocab_size != vocab_size:
            raise ConfigError(
                f"store: {where} has a vocabulary of {self.vocab_size} tokens, the target one of {vocab_size}"
            )
        if tokenizer_hash is not None and self.tokenizer_hash != tokenizer_hash:
            raise ConfigError(
                f"store: {where} was made with tokenizer {self.tokenizer_hash}, the target has {tokenizer_hash}"
            )

    def write(self, folder: Path) -> None:
        (folder / HEADER).write_text(json.dumps(asdict(self), indent=2) + "\n")


def text_type(vocab_size: int) -> np.dtype[Any]:
    """How ids, and ``vocab_size`` itself, are stored."""
    return np.dtype("<u2") if vocab_size < 1 << 16 else np.dtype("<i4")


def join(documents: Iterable[Sequence[int]], vocab_size: int) -> npt.NDArray[Any]:
    """One text of all documents, each closed by the id ``vocab_size``. Raises ``ValueError`` for an id beyond it."""
    parts: list[npt.NDArray[Any]] = []
    end = np.array([vocab_size], np.int64)
    for document in documents:
        ids = np.asarray(document, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(f"a token id is outside [0, {vocab_size})")
        parts += [ids, end]
    whole = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return whole.astype(text_type(vocab_size))


def build_index(text: npt.NDArray[Any], vocab_size: int) -> Int32Array:
    """``starts`` and ``suffixes`` in one array, as ``index.bin`` holds them. About 1 s for each million tokens."""
    starts = np.zeros(vocab_size + 2, np.int32)
    starts[1:] = np.cumsum(np.bincount(text, minlength=vocab_size + 1))
    return np.concatenate([starts, suffix_array(text, vocab_size)])


class Datastore:
    """Look-up in one text. Safe to read from any number of threads.

    text: (n,) ids; index: (vocab_size + 2 + n,) int32, see ``build_index``.
    """

    def __init__(self, text: npt.NDArray[Any], index: Int32Array, vocab_size: int) -> None:
        if text.dtype != text_type(vocab_size) or index.shape != (vocab_size + 2 + len(text),):
            raise ValueError(f"a text of {len(text)} {text.dtype} does not go with an index of {index.shape}")
        # Plain arrays over the same memory: a memmap's own indexing is several times slower.
        self.text, index = np.asarray(text), np.asarray(index)
        self.starts, self.suffixes = index[: vocab_size + 2], index[vocab_size + 2 :]
        self._text, self._suffixes = self.text.data, self.suffixes.data
        self.vocab_size = vocab_size
        counts = np.diff(self.starts[: vocab_size + 1])
        common = np.argsort(-counts, kind="stable")[:NUM_COMMON]
        common = common[counts[common] > 0]
        self.common: Int32Array = common.astype(np.int32)
        self.shares: npt.NDArray[np.float64] = counts[common] / max(1, len(text))

    @classmethod
    def of(cls, documents: Iterable[Sequence[int]], vocab_size: int) -> Datastore:
        """A store in memory."""
        text = join(documents, vocab_size)
        return cls(text, build_index(text, vocab_size), vocab_size)

    def __len__(self) -> int:
        return len(self.text)

    def narrow(self, found: Range, length: int, token: int) -> Range:
        """Of the suffixes in ``found``, which share their first ``length`` tokens, those that go on with ``token``."""
        if token >= self.vocab_size or found[0] >= found[1]:
            return (0, 0)
        if length == 0:
            return int(self.starts[token]), int(self.starts[token + 1])
        low = self._rank_of(found, length, token)
        return low, self._rank_of((low, found[1]), length, token + 1)

    def followers(self, found: Range, length: int, samples: int) -> list[tuple[int, int]]:
        """(token, count) behind the runs of ``length`` tokens at ``found``, from ``samples`` evenly spaced ranks."""
        low, high = found
        taken = min(high - low, samples)
        if taken <= 0:
            return []
        ranks = low + (2 * np.arange(taken, dtype=np.int64) + 1) * (high - low) // (2 * taken)
        positions = self.suffixes[ranks].astype(np.int64) + length
        counts = Counter(self.text[positions[positions < len(self.text)]].tolist())
        return [(token, count) for token, count in counts.items() if token < self.vocab_size]

    def _rank_of(self, found: Range, length: int, token: int) -> int:
        """The first rank in ``found`` whose suffix has ``token`` or more behind its first ``length`` tokens."""
        text, size = self._text, len(self.text)

        def behind(suffix: int) -> int:
            return text[suffix + length] if suffix + length < size else -1

        return bisect_left(self._suffixes, token, *found, key=behind)


def open_store(folder: Path) -> Datastore:
    """The store in ``folder``, mapped. Its index is made first where neither it nor the disk cache has one."""
    header = StoreHeader.read(folder)
    text = _text(folder, header)
    path = _index_path(folder, header)
    if not path.exists():
        log.info("store: making the index of %s", folder)
        write_index(text, header.vocab_size, path)
    return Datastore(text, np.memmap(path, np.int32, "r"), header.vocab_size)


def open_when_ready(folder: Path, ready: Callable[[Datastore], None]) -> None:
    """Call ``ready`` with the store in ``folder``: at once where its index is there, else from a thread that makes it.

    What is wrong with the folder is raised at once, as ``ConfigError``.
    """
    header = StoreHeader.read(folder)
    _text(folder, header)
    if _index_path(folder, header).exists():
        ready(open_store(folder))
    else:
        threading.Thread(target=lambda: ready(open_store(folder)), name="datastore-index", daemon=True).start()


def write_index(text: npt.NDArray[Any], vocab_size: int, path: Path) -> None:
    """Make the index of ``text`` at ``path``. Whoever does so at the same time writes the same."""
    index = build_index(text, vocab_size)
    part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    index.tofile(part)
    os.replace(part, path)


def _text(folder: Path, header: StoreHeader) -> npt.NDArray[Any]:
    text = np.memmap(folder / TEXT, text_type(header.vocab_size), "r")
    if len(text) != header.num_tokens:
        raise ConfigError(f"store: {folder / TEXT} has {len(text)} tokens, its header says {header.num_tokens}")
    return text


def _index_path(folder: Path, header: StoreHeader) -> Path:
    """The folder's own index where it has one, else the place of one in the disk cache."""
    own = folder / INDEX
    return own if own.exists() else cache_folder("stores") / f"{header.digest}-{header.vocab_size}.bin"

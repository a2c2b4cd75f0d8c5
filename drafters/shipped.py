"""What ships with the package for a target: where it is kept, and whose it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.core.errors import ConfigError
from cluster.core.types import tokenizer_hash

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ARTIFACTS = Path(__file__).with_name("artifacts")
DEFAULT = "default"
"""In place of a folder: whichever shipped one fits the target."""


def find_shipped(header: str, fits: Callable[[Path], bool]) -> Path | None:
    """The first shipped folder that has such a header (``store/header.json``, ...) and ``fits``."""
    folders = sorted(path.parent for path in ARTIFACTS.glob(f"*/{header}"))
    return next(filter(fits, folders), None)


def find_folder(name: str, header: str, fits: Callable[[Path], bool], missing: str) -> Path:
    """The folder ``name``; for ``default`` what ``find_shipped`` finds. Raises ``ConfigError(missing)`` where that is
    nothing."""
    folder = Path(name).expanduser() if name != DEFAULT else find_shipped(header, fits)
    if folder is None:
        raise ConfigError(missing)
    return folder


@functools.cache
def tokenizer_of(model_folder: Path) -> str | None:
    """The ``tokenizer_hash`` of a model's folder, without transformers; None where it has no ``tokenizer.json``."""
    tokenizer = read_tokenizer(model_folder)
    return None if tokenizer is None else tokenizer_hash(tokenizer.get_vocab())


def read_tokenizer(model_folder: Path) -> Tokenizer | None:
    """None where the folder has no ``tokenizer.json``. Raises ``ConfigError`` for one that does not load."""
    path = model_folder / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"model.source: {path} does not load: {error}") from None
    tokenizer.no_truncation()  # training leaves such settings behind
    tokenizer.no_padding()
    return tokenizer

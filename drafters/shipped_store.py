"""Which datastore a drafter uses: the folder it names, or the one shipped for its target's tokenizer."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from cluster.core.errors import ConfigError
from cluster.core.types import tokenizer_hash
from drafters.datastore import StoreHeader

logger = logging.getLogger(__name__)

ARTIFACTS = Path(__file__).with_name("artifacts")
DEFAULT = "default"


def find_store(name: str, vocab_size: int, model_folder: Path) -> Path | None:
    """The folder of the store ``name``, made for the target in ``model_folder``.

    ``default`` is whichever shipped store has the target's tokenizer; None where none has. A model folder without a
    ``tokenizer.json`` is known by its vocabulary's size alone. Raises ``ConfigError`` for any other store that does
    not fit, naming both sides.
    """
    if name != DEFAULT:
        folder = Path(name).expanduser()
        StoreHeader.read(folder).check(folder, vocab_size, tokenizer_of(model_folder))
        return folder
    for folder in sorted(path.parent for path in ARTIFACTS.glob("*/store/header.json")):
        header = StoreHeader.read(folder)
        if header.vocab_size == vocab_size and header.tokenizer_hash == tokenizer_of(model_folder):
            return folder
    logger.info("store: none is shipped for the tokenizer of %s", model_folder)
    return None


@functools.cache
def tokenizer_of(model_folder: Path) -> str | None:
    """The ``tokenizer_hash`` of a model's folder, without transformers; None where it has no ``tokenizer.json``."""
    path = model_folder / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return tokenizer_hash(Tokenizer.from_file(str(path)).get_vocab())
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"model.source: {path} does not load: {error}") from None

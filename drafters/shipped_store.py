"""Which datastore a drafter uses: the folder it names, or the one shipped for its target's tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

from drafters.datastore import HEADER, StoreHeader
from drafters.shipped import DEFAULT, find_shipped, tokenizer_of

log = logging.getLogger(__name__)


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
    wanted = vocab_size, tokenizer_of(model_folder)

    def fits(folder: Path) -> bool:
        header = StoreHeader.read(folder)
        return (header.vocab_size, header.tokenizer_hash) == wanted

    shipped = find_shipped(f"store/{HEADER}", fits)
    if shipped is None:
        log.info("store: none is shipped for the tokenizer of %s", model_folder)
    return shipped

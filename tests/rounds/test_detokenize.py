"""Text as it streams, with a tokenizer whose tokens are single bytes."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from cluster.rounds.detokenize import StreamDecoder, TextStream

LETTERS = "abc▁"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Token i < 256 is the byte i, as in models with byte fallback; then come some letters."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {letter: 256 + i for i, letter in enumerate(LETTERS)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def ids(text: str) -> list[int]:
    return [token for char in text for token in ([256 + LETTERS.index(char)] if char in LETTERS else char.encode())]


def test_a_character_split_over_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer, ids("a"))
    assert [decoder.step(token) for token in ids("b☃c")] == ["b", "", "", "☃", "c"]


def test_a_stop_string_is_found_over_split_characters(tokenizer: Tokenizer) -> None:
    stream = TextStream(StreamDecoder(tokenizer, ids("a")), ("☃c",))
    hits = [stream.push(token) for token in ids("ab☃c")]
    assert hits == [False] * 5 + [True]
    assert stream.take() == "ab"


def test_bytes_that_are_no_text_never_raise(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    pool = [*range(0x80, 0x100), *range(256, 256 + len(LETTERS)), *ids("☃") * 20]
    for _ in range(300):
        decoder = StreamDecoder(tokenizer, [rng.choice(pool) for _ in range(8)])
        for _ in range(20):
            decoder.step(rng.choice(pool))
        text = "".join(decoder.step(token) for token in ids("abcabc"))
        assert text.endswith("abc")

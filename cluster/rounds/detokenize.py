"""Token ids to text, as it streams: incremental decoding, stop strings, and what must be held back.

The decoding itself is the ``tokenizers`` library's; this file only decides which part of its text may be shown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from cluster.core.types import GenerateRequest

log = logging.getLogger(__name__)

PRIME_TOKENS = 8  # enough of the prompt's tail for decoders that treat a leading token specially


class TokenDecoder(Protocol):
    """Turns one token into the text it completes; '' while a character is still split over tokens."""

    def step(self, token: int) -> str: ...


class StreamDecoder:
    """``tokenizers``' DecodeStream, primed with the prompt's tail so that leading spaces come out right."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        for token in prompt_token_ids[-PRIME_TOKENS:]:
            self.step(token)

    def step(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception as error:
            # Bytes that are no text can make a decoder change text it has given out (byte fallback does): DecodeStream
            # then raises at every further token. Only its text so far is lost by starting anew.
            log.debug("the text stream starts anew at token %d: %s", token, error)
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._tokenizer, token) or ""


class TextStream:
    """Text of one session: what came, what may be shown, and whether a stop string ended it.

    A tail that could still grow into a stop string is held back until it cannot.
    """

    def __init__(self, decoder: TokenDecoder, stop: Iterable[str] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._ready = ""  # may be shown
        self._pending = ""  # could still grow into a stop string

    def push(self, token: int, may_stop: bool = True) -> bool:
        """Add a token's text. True where a stop string is complete: the text then ends right before it."""
        self._pending += self._decoder.step(token)
        if may_stop and self._stop:
            hits = [at for at in (self._pending.find(stop) for stop in self._stop) if at >= 0]
            if hits:
                self._pending = self._pending[: min(hits)]
                return True
        # Split after every token, not at take(): what a stop string may match must not depend on block boundaries.
        cut = len(self._pending) - held_back(self._pending, self._stop)
        self._ready += self._pending[:cut]
        self._pending = self._pending[cut:]
        return False

    def close(self) -> None:
        """No more tokens will come: nothing is held back any longer."""
        self._ready += self._pending
        self._pending = ""

    def take(self) -> str:
        """The text that may be shown now and was not taken before."""
        ready, self._ready = self._ready, ""
        return ready


def text_of(tokenizer: Any, request: GenerateRequest) -> TextStream:
    """The text of a request's answer, nothing of it yet. ``tokenizer``: of ``transformers``, with a fast backend."""
    return TextStream(StreamDecoder(tokenizer.backend_tokenizer, request.prompt_token_ids), request.params.stop)


def held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest tail of ``text`` that is a proper prefix of a stop string."""
    longest = max((len(stop) for stop in stops), default=0) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(len(stop) > size and stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0

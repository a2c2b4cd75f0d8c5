"""A chat template as token ids between the turns, so that a model can write both sides of a chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MARK, _OTHER = "PACELINEMARK", "PACELINEOTHER"


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """What stands before a first user turn, between a user turn and its reply, and between a reply and the next turn.

    Each is text. End-of-turn tokens belong to what follows a turn, not to the turn.
    """

    opening: str
    to_reply: str
    to_user: str

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFrame:
        """Read off the tokenizer's chat template. Raises ``ValueError`` where there is none or it rewrites turns."""
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template")
        user, reply = {"role": "user", "content": _MARK}, {"role": "assistant", "content": _OTHER}
        first = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        second = tokenizer.apply_chat_template([user, reply, user], add_generation_prompt=True, tokenize=False)
        if first.count(_MARK) != 1 or second.count(_MARK) != 2 or second.count(_OTHER) != 1:
            raise ValueError("the chat template does not keep each turn's text once")
        opening, to_reply = first.split(_MARK)
        to_user = second.split(_OTHER)[1].split(_MARK)[0]
        return cls(opening, to_reply, to_user)

"""A draft model with a vocabulary of its own: guesses travel as text (string-level exact match, arXiv 2502.05202).

Idea: the session's text, decoded with the target's tokenizer, is the draft's prompt; the draft's guesses are decoded,
and encoded again with the target's. Cost: tens of microseconds a node for the tokenizers. Where both split a text
differently, or a guess ends within a word, it costs guesses, never correctness. Guesses are greedy: noise of one
vocabulary means nothing in another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from cluster.core.errors import UnknownSession
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from drafters.base import Ask, Drafter

GREEDY = SamplingParams(temperature=0.0)
CONTEXT = 8  # tokens before a guess that are decoded and encoded with it, since words' beginnings depend on them
SETTLED = 64  # characters from the end on, the draft's tokens of a text stay what they are
BROKEN = "\ufffd"  # stands for a character of which some bytes are missing


@dataclass(slots=True)
class _Session:
    """``tokens``: the target's, of which ``text`` is made; ``ids``: the draft's, which begin at ``starts``."""

    tokens: list[int]
    text: str
    ids: list[int]
    starts: list[int]


class TranslatedDrafter:
    """``drafter``, which guesses in the vocabulary of tokenizer ``own``, for a target of tokenizer ``target``."""

    def __init__(self, drafter: Drafter, own: Tokenizer, target: Tokenizer, vocab_size: int) -> None:
        """vocab_size: the target's."""
        self.stage = drafter.stage
        self.vocab_size: int | None = vocab_size
        self._drafter = drafter
        self._own = own
        self._target = target
        self._sessions: dict[str, _Session] = {}

    def begin(
        self, session_id: str, token_ids: Sequence[int], params: SamplingParams, prompt_len: int, owner: str = ""
    ) -> None:
        text = self._target.decode(list(token_ids))
        encoded = self._own.encode(text)
        session = _Session(list(token_ids), text, encoded.ids, [start for start, _ in encoded.offsets])
        self._drafter.begin(session_id, session.ids, GREEDY, len(session.ids))
        self._sessions[session_id] = session

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        session = self._session(session_id)
        context = session.tokens[-CONTEXT:]
        before = self._target.decode(context)
        after = self._target.decode([*context, *token_ids])
        session.tokens += token_ids
        if session.text.endswith(before) and after.startswith(before):
            session.text += after[len(before) :]
        else:  # a character came whole, of which there had been a part
            session.text = self._target.decode(session.tokens)
        held = session.ids
        self._encode(session)
        if session.ids[: len(held)] == held:
            if len(session.ids) > len(held):
                self._drafter.commit(session_id, session.ids[len(held) :])
        else:
            self._drafter.begin(session_id, session.ids, GREEDY, len(session.ids))

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        """Upstream's trees are not looked at: they are in the target's vocabulary."""
        sessions = {ask.session_id: self._session(ask.session_id) for ask in asks}
        found = self._drafter.propose(asks, {})
        trees = {
            ask.session_id: self._translated(sessions[ask.session_id], found[ask.session_id], ask)
            for ask in asks
            if ask.session_id in found
        }
        return {session_id: tree for session_id, tree in trees.items() if len(tree)}

    def end(self, session_id: str) -> None:
        self._sessions.pop(session_id, None)
        self._drafter.end(session_id)

    def _session(self, session_id: str) -> _Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSession(f"session {session_id!r} was not begun")
        return session

    def _encode(self, session: _Session) -> None:
        """Bring ``ids`` up to ``text``: from the last word on that begins ``SETTLED`` characters before its end."""
        text = session.text
        keep = len(session.starts)
        while keep > 1 and (
            session.starts[keep - 1] > len(text) - SETTLED or not _opens(text, session.starts[keep - 1])
        ):
            keep -= 1
        if keep <= 1:  # with what the tokenizer puts before a text
            encoded, start, keep = self._own.encode(text), 0, 0
        else:
            keep -= 1
            start = session.starts[keep]
            encoded = self._own.encode(text[start:], add_special_tokens=False)
        session.ids = [*session.ids[:keep], *encoded.ids]
        session.starts = [*session.starts[:keep], *(start + at for at, _ in encoded.offsets)]

    def _translated(self, session: _Session, tree: TokenTree, ask: Ask) -> TokenTree:
        """``tree`` of the draft's tokens as one of the target's. A node's score is that of the first draft node with
        which its text is complete."""
        texts = self._texts(session, tree)
        own_scores = tree.scores.tolist()
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        scores: list[float] = []
        for leaf in sorted(set(range(len(tree))) - set(tree.parents.tolist())):
            path = tree.path(leaf)
            place, end = -1, 0
            for token, width in self._words(session, texts[leaf]):
                end += width
                score = next((own_scores[node] for node in path if len(texts[node]) >= end), own_scores[leaf])
                place = nodes.setdefault((place, token), len(nodes))
                if place == len(scores):
                    scores.append(score)
                scores[place] = max(scores[place], score)
        built = TokenTree.build([token for _, token in nodes], [parent for parent, _ in nodes], scores, int(self.stage))
        return built.prune(ask.max_nodes, ask.max_depth)

    def _texts(self, session: _Session, tree: TokenTree) -> list[str]:
        """What each path of ``tree`` adds to the session's text, as far as its characters are whole."""
        context, own = session.ids[-CONTEXT:], tree.tokens.tolist()
        before = self._own.decode(context)
        texts = [self._own.decode([*context, *(own[at] for at in tree.path(node))]) for node in range(len(tree))]
        return [text[len(before) :].rstrip(BROKEN) if text.startswith(before) else "" for text in texts]

    def _words(self, session: _Session, text: str) -> list[tuple[int, int]]:
        """The target's tokens of ``text`` behind the session's, each with how many characters it completes."""
        before = self._target.decode(session.tokens[-CONTEXT:])
        encoded = self._target.encode(before + text, add_special_tokens=False)
        first = next((at for at, (start, _) in enumerate(encoded.offsets) if start >= len(before)), len(encoded.ids))
        if first == 0 or first == len(encoded.ids) or encoded.offsets[first - 1][1] > len(before):
            encoded, first, before = self._target.encode(text, add_special_tokens=False), 0, ""
        ends = [len(before), *(end for _, end in encoded.offsets[first:])]
        return [(token, ends[at + 1] - ends[at]) for at, token in enumerate(encoded.ids[first:])]


def _opens(text: str, at: int) -> bool:
    """Whether a word may begin there, so that what comes before does not change how it is split."""
    return text[at : at + 1].isspace() and not text[at - 1 : at].isspace()

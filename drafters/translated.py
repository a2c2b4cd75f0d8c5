"""A draft model with a vocabulary of its own: guesses travel as text (string-level exact match, arXiv 2502.05202).

Idea: the session's text, decoded with the target's tokenizer, is the draft's prompt; the draft's guesses are decoded,
and encoded again with the target's. Cost: tens of microseconds a node for the tokenizers. Where both split a text
differently, or a guess ends within a word, it costs guesses, never correctness. Guesses are greedy: noise of one
vocabulary means nothing in another.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from cluster.core.errors import UnknownSession
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from drafters.base import Ask, Drafter

GREEDY = SamplingParams(temperature=0.0)
CONTEXT = 8  # tokens before a guess that are decoded and encoded with it, since words' beginnings depend on them
SETTLED = 64  # characters before a text's end, and earlier, tokens stay what they are whatever comes behind
BROKEN = "\ufffd"  # stands for a character of which some bytes are missing
MAX_PENDING = 16  # tokens without a whole character: the text is not one that becomes whole


@dataclass(slots=True)
class _Session:
    """``tokens``: the target's, of which the first ``read`` make ``text``; characters were whole after ``whole`` of
    them, too. ``ids``: the draft's of that text, which begin at ``starts``."""

    tokens: list[int]
    read: int
    whole: int
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
        starts = [start for start, _ in encoded.offsets]
        self._drafter.begin(session_id, encoded.ids, GREEDY, len(encoded.ids))
        self._sessions[session_id] = _Session(list(token_ids), len(token_ids), 0, text, encoded.ids, starts)

    def commit(self, session_id: str, token_ids: Sequence[int]) -> None:
        session = self._session(session_id)
        session.tokens += token_ids
        before = self._target.decode(session.tokens[session.whole : session.read])
        after = self._target.decode(session.tokens[session.whole :])
        if after.endswith(BROKEN) and len(session.tokens) - session.read <= MAX_PENDING:
            return  # the draft is told of a character once all of it is there
        settled = len(session.text) - SETTLED
        session.text += after[len(before) :]
        session.whole, session.read = session.read, len(session.tokens)
        held = session.ids
        self._encode(session, settled)
        if session.ids[: len(held)] == held:
            if len(session.ids) > len(held):
                self._drafter.commit(session_id, session.ids[len(held) :])
        else:
            self._drafter.begin(session_id, session.ids, GREEDY, len(session.ids))

    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        """Upstream's trees are not looked at: they are in the target's vocabulary. No guess within a character."""
        sessions = {ask.session_id: self._session(ask.session_id) for ask in asks}
        ready = [ask for ask in asks if sessions[ask.session_id].read == len(sessions[ask.session_id].tokens)]
        found = self._drafter.propose(ready, {})
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

    def _encode(self, session: _Session, settled: int) -> None:
        """Bring ``ids`` up to ``text``. Those of its first ``settled`` characters stay.

        A tokenizer may put a space before whatever it is given, so what is encoded anew begins some words before, and
        counts from the last of the old tokens' beginnings on where one of the new ones begins.
        """
        text, starts = session.text, session.starts
        last = bisect_right(starts, settled) - 1
        first = bisect_right(starts, settled - SETTLED) - 1
        if first >= 1:
            encoded = self._own.encode(text[starts[first] :], add_special_tokens=False)
            begun: dict[int, int] = {}
            for index, (start, _) in enumerate(encoded.offsets):
                begun.setdefault(starts[first] + start, index)
            joint = next((start for start in reversed(starts[first + 1 : last + 1]) if begun.get(start)), None)
            if joint is not None:
                kept, new = bisect_left(starts, joint), begun[joint]
                session.ids = [*session.ids[:kept], *encoded.ids[new:]]
                session.starts = [*starts[:kept], *(starts[first] + start for start, _ in encoded.offsets[new:])]
                return
        encoded = self._own.encode(text)
        session.ids, session.starts = encoded.ids, [start for start, _ in encoded.offsets]

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

"""Stop rules inside an accepted block: every token is applied as if it were its own round."""

from __future__ import annotations

import random

import pytest

from cluster.core.types import FinishReason, GenerateRequest, Origin, SamplingParams, StreamItem
from cluster.rounds.detokenize import TextStream, held_back
from cluster.rounds.session import Limits, Session

EOS = 0
ALPHABET = "_abcdefghijklmnopqrstuvwxyz"


class LetterDecoder:
    """Token i is the i-th letter; the end-of-text token has no text."""

    def step(self, token: int) -> str:
        return "" if token == EOS else ALPHABET[token % len(ALPHABET)]


def ids(text: str) -> list[int]:
    return [ALPHABET.index(letter) for letter in text]


def make(params: SamplingParams, resume: str = "", max_model_len: int = 1000) -> Session:
    request = GenerateRequest("r", (5, 6, 7), params, tuple(ids(resume)))
    return Session(request, Limits(max_model_len, frozenset({EOS})), TextStream(LetterDecoder(), params.stop))


def advance(session: Session, tokens: list[int]) -> StreamItem:
    origins = [Origin.SMALL] * (len(tokens) - 1) + [Origin.TARGET]
    return session.advance(tokens, origins, drafted=len(tokens))[0]


def test_a_block_without_a_stop_is_emitted_whole() -> None:
    session = make(SamplingParams(max_tokens=10, seed=9))
    item = advance(session, ids("abc"))
    assert item.token_ids == tuple(ids("abc"))
    assert item.text == "abc"
    assert (item.position, item.seed, item.finish_reason) == (0, 9, None)
    assert item.origins == (Origin.SMALL, Origin.SMALL, Origin.TARGET)
    item = advance(session, ids("d"))
    assert (item.position, item.seed) == (3, None)


def test_end_of_text_cuts_the_block_and_keeps_its_own_token() -> None:
    session = make(SamplingParams(max_tokens=10))
    item = advance(session, [*ids("ab"), EOS, *ids("cd")])
    assert item.token_ids == (*ids("ab"), EOS)
    assert item.text == "ab"
    assert item.finish_reason is FinishReason.STOP
    assert session.stats.tokens_by_origin == (0, 3, 0)
    assert session.stats.accepted == 3


def test_ignore_eos_goes_on() -> None:
    session = make(SamplingParams(max_tokens=10, ignore_eos=True))
    assert advance(session, [EOS, *ids("a")]).finish_reason is None


def test_a_stop_string_cuts_text_and_tokens() -> None:
    session = make(SamplingParams(max_tokens=20, stop=("cd",)))
    item = advance(session, ids("abcdef"))
    assert (item.text, item.token_ids) == ("ab", tuple(ids("abcd")))
    assert item.finish_reason is FinishReason.STOP


def test_a_possible_stop_prefix_is_held_back_and_given_out_when_it_is_none() -> None:
    session = make(SamplingParams(max_tokens=20, stop=("cde",)))
    assert advance(session, ids("abcd")).text == "ab"
    assert advance(session, ids("x")).text == "cdx"
    assert advance(session, ids("c")).text == ""


def test_held_back_text_is_given_out_when_the_length_ends_the_session() -> None:
    session = make(SamplingParams(max_tokens=3, stop=("cde",)))
    item = advance(session, ids("bcdz"))
    assert (item.text, item.finish_reason) == ("bcd", FinishReason.LENGTH)


def test_max_tokens_cuts_the_block() -> None:
    session = make(SamplingParams(max_tokens=2))
    item = advance(session, ids("abc"))
    assert (item.token_ids, item.finish_reason) == (tuple(ids("ab")), FinishReason.LENGTH)


def test_the_context_ends_the_session() -> None:
    session = make(SamplingParams(max_tokens=100), max_model_len=5)
    assert session.max_depth == 1
    assert advance(session, ids("abc")).token_ids == tuple(ids("ab"))
    assert session.finish_reason is FinishReason.LENGTH


def test_stop_token_ids_stop() -> None:
    session = make(SamplingParams(max_tokens=9, stop_token_ids=(2,)))
    item = advance(session, ids("abc"))
    assert (item.token_ids, item.finish_reason) == ((1, 2), FinishReason.STOP)


def test_a_stop_string_before_min_tokens_does_not_stop_and_is_not_matched_later() -> None:
    session = make(SamplingParams(max_tokens=9, min_tokens=3, stop=("ab",)))
    assert advance(session, ids("abcd")).finish_reason is None
    assert advance(session, ids("ab")).finish_reason is FinishReason.STOP


def test_tree_depth_leaves_room_for_the_bonus_token() -> None:
    session = make(SamplingParams(max_tokens=4))
    assert session.max_depth == 3
    advance(session, ids("abc"))
    assert session.max_depth == 0


@pytest.mark.parametrize("stop", [(), ("cab",), ("bb", "abcab")])
@pytest.mark.parametrize("seed", range(6))
def test_any_split_into_blocks_gives_the_same_text_and_tokens(stop: tuple[str, ...], seed: int) -> None:
    rng = random.Random(seed)
    tokens = [rng.choice(ids("abc")) for _ in range(40)]
    params = SamplingParams(max_tokens=30, min_tokens=5, stop=stop)

    def run(split: random.Random, resumed: int = 0) -> tuple[str, list[int], FinishReason | None, int]:
        session = make(params, resume="".join(ALPHABET[token] for token in tokens[:resumed]))
        text, at = "", resumed
        while session.finish_reason is None:
            size = split.randint(1, 6)
            text += advance(session, tokens[at : at + size]).text
            at += size
        return text, session.tokens[3:], session.finish_reason, session.key.digest

    whole = run(random.Random(100))
    for other in range(5):
        assert run(random.Random(other)) == whole
    for resumed in range(len(whole[1])):
        text, *rest = run(random.Random(7), resumed)
        assert rest == list(whole[1:])
        assert whole[0].endswith(text)


@pytest.mark.parametrize("stop", [(), ("cab",), ("aab", "bbbb"), ("abcabc",)])
def test_text_goes_on_where_it_stood_also_in_the_middle_of_what_was_held_back(stop: tuple[str, ...]) -> None:
    rng = random.Random(4)
    tokens = [rng.choice(ids("abc")) for _ in range(40)]
    params = SamplingParams(max_tokens=30, min_tokens=3, stop=stop)
    whole = make(params)
    texts: list[str] = []
    for token in tokens:
        if whole.finish_reason is None:
            texts.append(advance(whole, [token]).text)
    for at in range(len(texts)):
        resumed = make(params, resume="".join(ALPHABET[token] for token in tokens[:at]))
        rest = advance(resumed, tokens[at:]).text
        assert "".join(texts[:at]) + rest == "".join(texts)


def test_resumed_tokens_that_hold_a_stop_end_the_session_at_once() -> None:
    session = make(SamplingParams(max_tokens=9, stop=("ab",)), resume="ab")
    assert session.finish_reason is FinishReason.STOP
    assert session.closing_item().finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [("abc", ("cd",), 1), ("abc", ("d",), 0), ("ab", ("abab",), 2), ("abab", ("abab",), 2), ("", ("a",), 0)],
)
def test_held_back_is_the_longest_tail_that_may_grow_into_a_stop(
    text: str, stops: tuple[str, ...], expected: int
) -> None:
    assert held_back(text, stops) == expected

"""Guesses through text: whatever splits it on either side, what the draft model says arrives in the target's tokens."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import pytest
from fakes import ScriptedDrafter
from tiny_models import GREEDY
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from cluster.core.errors import ConfigError, UnknownSession
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin
from cluster.rounds.chain_drafter import best_chain
from drafters.base import Ask
from drafters.shipped import read_tokenizer
from drafters.translated import MAX_PENDING, TranslatedDrafter

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "naïve",
    "日本語",
    "speakers",
    "wrote",
    "12",
    "letters,",
    "each",
    "of",
    "them",
    "(as",
    "always)",
    "unhappy:\n\n-",
    "yes\n",
]


def text_of(seed: int, words: int = 120) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def trained(size: int, seed: int, words: int) -> Tokenizer:
    """A byte-level BPE of at most ``size`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text_of(seed, words)], trainer)
    return tokenizer


def spaced(prepend: str) -> Tokenizer:
    """As sentencepiece has it: a space before whatever is encoded (``prepend``: how), a token before each text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if prepend == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator([word for seed in range(4) for word in text_of(seed).split(" ")], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


TARGET, FINE, COARSE = trained(300, 1, 300), trained(262, 2, 60), trained(400, 3, 600)


class Oracle:
    """A draft model that knows the whole text, in tokens of its own."""

    def __init__(self, text: str, own: Tokenizer) -> None:
        self.text, self.own = text, own

    def guess(self, tokens: list[int], ask: Ask) -> TokenTree:
        read = self.own.decode(tokens)
        assert self.text.startswith(read), "the draft is told the session's text"
        known = self.own.encode(self.text)
        next_at = bisect_left([start for start, _ in known.offsets], len(read), lo=1)
        left = known.ids[next_at : next_at + 12]
        if known.offsets[next_at - 1][1] > len(read):  # within one of its tokens
            left = []
        return TokenTree.build(left, range(-1, len(left) - 1), [0.9**at for at in range(1, len(left) + 1)])


def drafter_of(text: str, own: Tokenizer) -> tuple[TranslatedDrafter, ScriptedDrafter]:
    inner = ScriptedDrafter(Oracle(text, own).guess, Origin.MEDIUM, own.get_vocab_size())
    return TranslatedDrafter(inner, own, TARGET, TARGET.get_vocab_size()), inner


def whole(token_ids: Sequence[int]) -> bool:
    return not TARGET.decode(list(token_ids)).endswith("\ufffd")


KINDS = {"finer": FINE, "equal": TARGET, "coarser": COARSE} | {
    kind: spaced(kind) for kind in ("normalizer", "first", "always")
}


@pytest.mark.parametrize("own", KINDS.values(), ids=KINDS)
def test_what_a_draft_knows_comes_in_the_targets_tokens(own: Tokenizer) -> None:
    for seed in range(6):
        text, rng = text_of(seed), random.Random(seed)
        ids = TARGET.encode(text).ids
        drafter, inner = drafter_of(text, own)
        base, right, wanted = 5, 0, 0
        while not whole(ids[:base]):
            base += 1
        drafter.begin("s", ids[:base], GREEDY, base)
        while base < len(ids) - 12:
            assert own.decode(inner.tokens["s"]) == TARGET.decode(ids[:base])
            assert abs(len(inner.tokens["s"]) - len(own.encode(TARGET.decode(ids[:base])).ids)) <= 3
            tree = drafter.propose([Ask("s", 24, 8)], {}).get("s", TokenTree.empty())
            tree.check(TARGET.get_vocab_size(), 24, 8)
            chain = best_chain(tree, 8).tokens.tolist()
            known = next((at for at, (a, b) in enumerate(zip(chain, ids[base:])) if a != b), len(chain))
            right, wanted = right + known, wanted + len(chain)
            step = rng.randint(1, 6)
            while not whole(ids[: base + step]):
                step += 1
            drafter.commit("s", ids[base : base + step])
            base += step
        drafter.end("s")
        assert inner.tokens == {}
        assert right > 0.7 * wanted > 100, "but for a guess's last word, which may not be over"


def test_a_character_that_comes_in_parts_is_told_once_it_is_whole() -> None:
    text = "a 日本語 mat 😀語"
    ids = TARGET.encode(text).ids
    drafter, inner = drafter_of(text, FINE)
    drafter.begin("s", ids[:1], GREEDY, 1)
    for at, token in enumerate(ids[1:], 2):
        drafter.commit("s", [token])
        assert "\ufffd" not in FINE.decode(inner.tokens["s"])
        assert whole(ids[:at]) or drafter.propose([Ask("s", 4, 4)], {}) == {}
    assert FINE.decode(inner.tokens["s"]) == text


def test_bytes_that_never_make_a_character_are_told_all_the_same() -> None:
    drafter, inner = drafter_of("", FINE)
    inner.make = lambda tokens, ask: TokenTree.empty()
    half = TARGET.encode("日").ids[:1]
    drafter.begin("s", TARGET.encode("a cat").ids, GREEDY, 1)
    for _ in range(2 * MAX_PENDING):
        drafter.commit("s", half)
    assert FINE.decode(inner.tokens["s"]).count("\ufffd") > MAX_PENDING


@pytest.mark.parametrize(
    "text", [text_of(9, 2000), "日本語の猫がマットの上に座った。" * 200], ids=["words", "no spaces"]
)
def test_long_texts_are_not_encoded_anew(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    ids = TARGET.encode(text).ids
    drafter, inner = drafter_of(text, COARSE)
    base = 3000
    while not whole(ids[:base]):
        base += 1
    drafter.begin("s", ids[:base], GREEDY, base)
    encoded: list[int] = []

    class Counting:
        def encode(self, text: str, add_special_tokens: bool = True) -> object:
            encoded.append(len(text))
            return COARSE.encode(text, add_special_tokens=add_special_tokens)

        def __getattr__(self, name: str) -> object:
            return getattr(COARSE, name)

    monkeypatch.setattr(drafter, "_own", Counting())
    end = base + 100
    while not whole(ids[:end]):
        end += 1
    for at in range(base, end):
        drafter.commit("s", ids[at : at + 1])
    assert 0 < max(encoded) < 200
    assert COARSE.decode(inner.tokens["s"]) == TARGET.decode(ids[:end])


def test_scores_fall_along_a_path_and_are_the_drafts() -> None:
    text = text_of(4)
    drafter, _ = drafter_of(text, FINE)
    ids = TARGET.encode(text).ids
    drafter.begin("s", ids[:20], GREEDY, 20)
    tree = drafter.propose([Ask("s", 24, 8)], {})["s"]
    scores = tree.scores.tolist()
    assert all(scores[node] <= scores[parent] for node, parent in enumerate(tree.parents.tolist()) if parent >= 0)
    assert 0.9**12 - 1e-6 <= min(scores) <= max(scores) <= 0.9 + 1e-6


def test_sessions_are_known_or_refused() -> None:
    drafter, _ = drafter_of("", FINE)
    with pytest.raises(UnknownSession):
        drafter.propose([Ask("s", 4, 4)], {})
    with pytest.raises(UnknownSession):
        drafter.commit("s", [1])
    drafter.end("s")


def test_a_tokenizer_is_read_without_what_training_left_in_it(tmp_path: Path) -> None:
    cut = Tokenizer.from_str(FINE.to_str())
    cut.enable_truncation(4)
    cut.enable_padding(length=32)
    cut.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer(tmp_path)
    assert read is not None
    assert read.encode(text_of(0)).ids == FINE.encode(text_of(0)).ids


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not load"):
        read_tokenizer(tmp_path)

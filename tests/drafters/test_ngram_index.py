"""The trie counts every run of the text, at once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from drafters.ngram_index import ROOT, NgramIndex


def runs_of(text: list[int], longest: int) -> Counter[tuple[int, ...]]:
    return Counter(
        tuple(text[start : start + length])
        for start in range(len(text))
        for length in range(1, longest + 1)
        if start + length <= len(text)
    )


def node_of(index: NgramIndex, run: tuple[int, ...]) -> int | None:
    node: int | None = ROOT
    for token in run:
        node = None if node is None else index.child(node, token)
    return node


@pytest.mark.parametrize("alphabet", [1, 2, 5, 50])
def test_text_appended_in_random_pieces_gives_the_counts_of_the_whole_text(alphabet: int) -> None:
    rng = np.random.default_rng(alphabet)
    text = rng.integers(0, alphabet, 300).tolist()
    index = NgramIndex(query=4)
    done = 0
    while done < len(text):
        step = int(rng.integers(0, 9))
        index.extend(text[done : done + step])
        done = min(len(text), done + step)
        assert index.runs() == runs_of(text[:done], 5)


@pytest.mark.parametrize("alphabet", [2, 6, 40])
def test_what_followed_a_run_is_every_occurrence_but_one_at_the_end(alphabet: int) -> None:
    text = np.random.default_rng(alphabet).integers(0, alphabet, 200).tolist()
    index = NgramIndex(query=3)
    for done, token in enumerate(text, start=1):
        index.extend([token])
        counts = runs_of(text[:done], 4)
        for length in range(1, min(3, done) + 1):
            suffix = tuple(text[done - length : done])
            expected = {run[-1]: count for run, count in counts.items() if run[:-1] == suffix}
            node = node_of(index, suffix)
            assert node is not None
            assert dict(index.followers(node)) == expected
            assert index.followed(node) == sum(expected.values())


def test_the_newest_tokens_are_start_positions_at_once() -> None:
    index = NgramIndex(query=4)
    index.extend([4, 5, 4])
    node = node_of(index, (4,))
    assert node is not None
    assert index.followers(node) == [(5, 1)]


def test_a_run_that_does_not_occur_or_is_too_long_is_not_found() -> None:
    index = NgramIndex(query=2)
    index.extend([1, 2, 3, 4])
    assert node_of(index, (2, 4)) is None
    assert node_of(index, (1, 2, 3, 4)) is None
    assert node_of(index, (2, 3, 4)) is not None


def test_a_query_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="query 0"):
        NgramIndex(0)

"""The trie counts every run of the text, at once, and stays within its bound."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from drafters.ngram_index import NgramIndex


def runs_of(text: list[int], window: int) -> Counter[tuple[int, ...]]:
    return Counter(
        tuple(text[start : start + length])
        for start in range(len(text))
        for length in range(1, window + 1)
        if start + length <= len(text)
    )


@pytest.mark.parametrize("alphabet", [1, 2, 5, 50])
def test_text_appended_in_random_pieces_gives_the_counts_of_the_whole_text(alphabet: int) -> None:
    rng = np.random.default_rng(alphabet)
    text = rng.integers(0, alphabet, 300).tolist()
    index = NgramIndex(window=5)
    done = 0
    while done < len(text):
        step = int(rng.integers(0, 9))
        index.extend(text[done : done + step])
        done = min(len(text), done + step)
        assert index.runs() == runs_of(text[:done], 5)
    assert index.num_nodes == len(runs_of(text, 5)) + 1


def test_the_newest_tokens_are_start_positions_at_once() -> None:
    index = NgramIndex(window=8)
    index.extend([4, 5, 4])
    assert index.suffixes(4) == [(1, index.find([4]))]
    assert index.children(index.suffixes(4)[0][1]) == [(5, index.find([4, 5]))]


@pytest.mark.parametrize("alphabet", [2, 6, 40])
def test_suffixes_are_the_runs_the_text_ends_with_that_something_followed(alphabet: int) -> None:
    text = np.random.default_rng(alphabet).integers(0, alphabet, 200).tolist()
    index = NgramIndex(window=6)
    for done, token in enumerate(text, start=1):
        index.extend([token])
        counts = runs_of(text[:done], 6)
        expected = []
        for length in range(min(4, done), 0, -1):
            suffix = tuple(text[done - length : done])
            followed = sum(count for run, count in counts.items() if run[:-1] == suffix)
            if followed:
                node = index.find(suffix)
                assert node is not None
                expected.append((length, node))
                assert index.continuations(node) == followed
        assert index.suffixes(4) == expected


@pytest.mark.parametrize("alphabet", [1, 3, 30])
def test_beyond_its_bound_the_index_equals_one_of_the_newest_tokens_alone(alphabet: int) -> None:
    text = np.random.default_rng(alphabet).integers(0, alphabet, 400).tolist()
    index = NgramIndex(window=4, max_tokens=50)
    for done, token in enumerate(text, start=1):
        index.extend([token])
        newest = text[max(0, done - 50) : done]
        assert index.runs() == runs_of(newest, 4)
        assert len(index) == len(newest)
        assert index.num_nodes == len(runs_of(newest, 4)) + 1 <= 4 * 50 + 1


def test_a_run_that_does_not_occur_is_not_found() -> None:
    index = NgramIndex(window=3)
    index.extend([1, 2, 3, 4])
    assert index.find([2, 4]) is None
    assert index.find([1, 2, 3, 4]) is None
    assert index.find([2, 3, 4]) is not None


@pytest.mark.parametrize(("window", "max_tokens"), [(1, 10), (8, 7)])
def test_sizes_that_cannot_work_are_refused(window: int, max_tokens: int) -> None:
    with pytest.raises(ValueError, match="window"):
        NgramIndex(window, max_tokens)

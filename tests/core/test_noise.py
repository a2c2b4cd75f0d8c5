"""Keyed noise: published vectors, the softmax law including its tail, independence. Seeds are fixed.

A statistical check below can fail by chance only when the code that draws changes; each docstring says how likely that
is for correct code.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.core import noise_native
from cluster.core.noise import (
    MAX_BITS,
    all_bits,
    bits_reaching,
    gumbel,
    keyed_noise,
    keyed_noise_at,
    noise_bits,
    philox4x32,
)

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, expected
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


def draws(logits: np.ndarray, seed: int, positions: int, choice: int = 0) -> np.ndarray:
    """The token drawn at each of ``positions`` positions: (positions,) ints. Vectorised over positions."""
    blocks = (len(logits) + 3) // 4
    counter = np.zeros((positions, blocks, 4), np.uint32)
    counter[:, :, 0] = np.arange(positions)[:, None]
    counter[:, :, 1] = choice
    counter[:, :, 2] = np.arange(blocks)
    bits = philox4x32(counter, np.array([seed & MAX_BITS, seed >> 32], np.uint32))
    sums = logits + gumbel(bits.reshape(positions, -1)[:, : len(logits)])
    return np.asarray(sums.argmax(axis=1))


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def chi_square_limit(freedom: int, sigmas: float) -> float:
    """The chi-square quantile of a one-sided normal deviation of ``sigmas`` (Wilson and Hilferty's approximation)."""
    share = 2.0 / (9.0 * freedom)
    return freedom * (1.0 - share + sigmas * math.sqrt(share)) ** 3


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(counter: str, key: str, expected: str) -> None:
    assert philox4x32(words(counter), words(key)).tolist() == words(expected).tolist()


def test_philox_treats_every_counter_of_a_batch_alone() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (3, 5, 4), dtype=np.uint32)
    key = words("a4093822 299f31d0")
    batch = philox4x32(counters, key)
    assert batch.shape == counters.shape
    assert batch.dtype == np.uint32
    for i in range(3):
        for j in range(5):
            assert (batch[i, j] == philox4x32(counters[i, j], key)).all()


@pytest.mark.parametrize("count", [1, 7, 8, 9, 12_288])
def test_compiled_noise_has_the_bits_of_numpys(count: int) -> None:
    native = noise_native.library()
    if native is None:
        pytest.skip("no compiler: there is only numpy's")
    random = np.random.default_rng(count)
    for seed, position, choice in ((0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1), (0x299F31D0A4093822, 70_000, 1)):
        blocks = random.integers(0, 2**32, count)
        ours = noise_native.philox_blocks(native, seed, position, choice, blocks)
        counters = np.zeros((count, 4), np.uint32)
        counters[:, 0], counters[:, 1], counters[:, 2] = position, choice, blocks
        assert (ours == philox4x32(counters, np.array([seed & MAX_BITS, seed >> 32], np.uint32))).all()


def test_noise_is_the_same_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = all_bits(5, 17, 1003), noise_bits(5, 17, np.array([3, 999_999]))
    monkeypatch.setattr(noise_native, "library", lambda: None)
    assert (all_bits(5, 17, 1003) == compiled[0]).all()
    assert (noise_bits(5, 17, np.array([3, 999_999])) == compiled[1]).all()


def test_philox_leaves_its_counter_as_it_was() -> None:
    counter = words("243f6a88 85a308d3 13198a2e 03707344")
    philox4x32(counter, words("a4093822 299f31d0"))
    assert (counter == words("243f6a88 85a308d3 13198a2e 03707344")).all()


def test_a_tokens_bits_stand_at_the_documented_counter_and_lane() -> None:
    seed, position, choice, token = 0x1122334455667788, 77, 3, 4 * 1234 + 2
    block = philox4x32(np.array([position, choice, 1234, 0], np.uint32), np.array([0x55667788, 0x11223344], np.uint32))
    assert noise_bits(seed, position, np.array([token]), choice).tolist() == [int(block[2])]


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 5, 257])
def test_single_tokens_get_the_bits_of_the_whole_vocabulary(vocab_size: int) -> None:
    """Both ways of ``noise_bits`` (few ids: a block each; many ids: all blocks) give the same bits."""
    whole = all_bits(2**63 + 5, 9, vocab_size)
    assert whole.shape == (vocab_size,)
    assert (noise_bits(2**63 + 5, 9, np.arange(vocab_size)) == whole).all()
    for token in range(vocab_size):
        assert noise_bits(2**63 + 5, 9, np.array([token]))[0] == whole[token]
    some = np.array([vocab_size - 1, 0, vocab_size // 2, 0])
    assert (noise_bits(2**63 + 5, 9, some) == whole[some]).all()


def test_no_ids_get_no_noise() -> None:
    assert keyed_noise_at(1, 2, np.array([], np.int64)).shape == (0,)


def test_gumbel_follows_its_formula_and_is_finite_at_both_ends() -> None:
    for bits in (0, 1, 12345, 2**31, MAX_BITS - 1, MAX_BITS):
        v = (bits + 0.5) / 2**32
        assert gumbel(np.array([bits], np.uint32))[0] == pytest.approx(-math.log(-math.log1p(-v)), rel=1e-15)
    ends = gumbel(np.array([0, MAX_BITS], np.uint32))
    assert 22.8 < ends[0] < 22.9
    assert -3.2 < ends[1] < -3.1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 9, 63])
def test_a_gumbel_value_does_not_depend_on_its_neighbours(size: int) -> None:
    """The walk takes logarithms of few values where a plain loop takes them of all: both must get the same float."""
    bits = np.random.default_rng(1).integers(0, 2**32, 1000, dtype=np.uint32)
    whole = gumbel(bits)
    for start in range(0, 1000 - size, 13):
        assert (gumbel(bits[start : start + size]) == whole[start : start + size]).all()


def test_gumbel_never_grows_with_its_bits() -> None:
    edges = np.concatenate([np.arange(2000), MAX_BITS - np.arange(2000)[::-1], 2**31 + np.arange(-1000, 1000)])
    assert (np.diff(gumbel(np.sort(edges).astype(np.uint32))) <= 0).all()


@pytest.mark.parametrize("noise", [-50.0, -3.2, -3.0, -2.9, 0.0, 1.0, 5.5, 12.0, 20.0, 22.8, 23.0, 1e9])
def test_the_bound_on_bits_loses_no_noise_that_reaches(noise: float) -> None:
    limit = bits_reaching(noise)
    assert 0 <= limit <= MAX_BITS
    if limit < MAX_BITS:
        above = np.unique(np.linspace(limit + 1, MAX_BITS, 1000).astype(np.uint32))
        assert (gumbel(above) < noise).all()
    if noise > -2.0:
        slack = 100 + limit // 10**6
        assert noise > 20.0 or gumbel(np.array([max(0, limit - slack)], np.uint32))[0] >= noise, "the bound is loose"


def test_draws_follow_the_softmax_law() -> None:
    """200,000 draws over 50 tokens; correct code fails with probability below 1e-6 (4.75 sigma)."""
    logits = np.random.default_rng(2).normal(0, 2, 50)
    expected = np.exp(logits) / np.exp(logits).sum() * 200_000
    assert expected.min() > 5
    counts = np.bincount(draws(logits, 2**40 + 1, 200_000), minlength=50)
    assert chi_square(counts, expected) < chi_square_limit(49, 4.75)


def test_draws_of_a_flat_row_are_even_over_all_lanes() -> None:
    """160,000 draws over 16 equal tokens (four blocks of four lanes); false alarm below 1e-6."""
    counts = np.bincount(draws(np.zeros(16), 99, 160_000), minlength=16)
    assert chi_square(counts, np.full(16, 10_000.0)) < chi_square_limit(15, 4.75)


def test_unlikely_tokens_are_drawn_at_their_due_rate() -> None:
    """240 tokens of probability 1e-6 beside a likely one, 250,000 draws: 60 expected among the unlikely.

    The count is Poisson; it leaves 27...102 with probability below 1e-6. The best of the unlikely is the one of the
    smallest bits, so one logarithm per draw is enough.
    """
    unlikely = 0
    for start in range(0, 250_000, 2500):
        counter = np.zeros((2500, 61, 4), np.uint32)
        counter[:, :, 0] = (start + np.arange(2500))[:, None]
        counter[:, :, 2] = np.arange(61)
        bits = philox4x32(counter, np.array([7, 0], np.uint32)).reshape(2500, -1)
        best_unlikely = math.log(1e-6) + gumbel(bits[:, 1:241].min(axis=1))
        unlikely += int((best_unlikely > math.log1p(-240e-6) + gumbel(bits[:, 0])).sum())
    assert 27 <= unlikely <= 102


def test_positions_choices_and_seeds_are_independent() -> None:
    """Pairs of draws over 8 tokens against the product law, 64 cells, 100,000 pairs; false alarm below 1e-5 in all."""
    logits = np.linspace(0, 1.5, 8)
    law = np.exp(logits) / np.exp(logits).sum()
    expected = np.outer(law, law).ravel() * 100_000
    base = draws(logits, 5, 100_001)
    others = {
        "next position": base[1:],
        "next choice": draws(logits, 5, 100_000, choice=1),
        "next seed": draws(logits, 6, 100_000),
        "seed differing in its high word": draws(logits, 5 + 2**32, 100_000),
    }
    for name, other in others.items():
        pairs = np.bincount(base[:100_000] * 8 + other, minlength=64)
        assert chi_square(pairs, expected) < chi_square_limit(63, 4.75), name


def test_tokens_are_independent_of_each_other() -> None:
    """Correlation of neighbouring tokens' bits over 100,000 positions, six lags; false alarm below 1e-5 (4.8 sigma)."""
    counter = np.zeros((100_000, 2, 4), np.uint32)
    counter[:, :, 0] = np.arange(100_000)[:, None]
    counter[:, :, 2] = np.arange(2)
    uniform = philox4x32(counter, np.array([11, 12], np.uint32)).reshape(100_000, 8) / 2**32 - 0.5
    for lag in range(1, 7):
        correlation = (uniform[:, 0] * uniform[:, lag]).mean() * 12
        assert abs(correlation) < 4.8 / math.sqrt(100_000)


def test_the_whole_vocabularys_noise_is_the_gumbel_of_its_bits() -> None:
    assert (keyed_noise(3, 4, 10) == gumbel(all_bits(3, 4, 10))).all()
    assert (keyed_noise(3, 4, 10, choice=1) != keyed_noise(3, 4, 10)).any()
    assert (keyed_noise_at(3, 4, np.array([9, 2])) == keyed_noise(3, 4, 10)[[9, 2]]).all()

"""Keyed noise: Gumbel variates that are a function of (seed, position, choice, token) and of nothing else.

They make a sampled token reproducible: whoever knows the session's seed gets the same noise for the same position, on
any machine, in any order, as often as wanted. The generator is Philox4x32-10 (Salmon et al., SC 2011): counter-based,
so one token's noise costs one block of four and no state is kept. Bits are integers, equal on every device; the Gumbel
values made from them are float64, and only those computed here, by the verifier, decide. See docs/exactness.md.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.core import noise_native

Uint32Array = npt.NDArray[np.uint32]
Uint64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]
MAX_BITS = 2**32 - 1

_LOW_WORD = np.uint64(MAX_BITS)
_WORD = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64) * np.arange(10, dtype=np.uint64)[:, None, None]


def philox4x32(counter: Uint32Array, key: Uint32Array) -> Uint32Array:
    """Philox4x32 with 10 rounds. counter: (..., 4) uint32, key: (2,) uint32. Returns (..., 4) uint32."""
    words = counter.reshape(-1, 4).T.astype(np.uint64)
    out = np.empty((words.shape[1], 4), np.uint32)
    _philox(words[0::2].copy(), words[1::2].copy(), int(key[0]), int(key[1]), out)
    return out.reshape(counter.shape)


def _philox(even: Uint64Array, odd: Uint64Array, key_0: int, key_1: int, out: Uint32Array) -> None:
    """Ten rounds over n counters. even: (2, n), words 0 and 2; odd: (2, n), words 1 and 3; out: (n, 4).

    The even words are multiplied, the odd ones are not, so that in this layout a round is five array operations; they
    overwrite ``even`` and ``odd``, because fresh memory would cost more than the arithmetic.
    """
    round_keys = (np.array([[key_0], [key_1]], np.uint64) + _KEY_STEPS) & _LOW_WORD
    product = np.empty_like(even)
    for round_key in round_keys:
        np.multiply(even, _MULTIPLIERS, out=product)
        np.right_shift(product[::-1], _WORD, out=even)
        even ^= odd
        even ^= round_key
        np.bitwise_and(product[::-1], _LOW_WORD, out=odd)
    out[:, 0::2], out[:, 1::2] = even.T, odd.T


def _blocks(seed: int, position: int, choice: int, blocks: npt.NDArray[Any]) -> Uint32Array:
    """(n, 4) uint32: the bits of the four tokens of each block; block b holds tokens 4 b to 4 b + 3."""
    native = noise_native.library()
    if native is not None:
        return noise_native.philox_blocks(native, seed, position, choice, blocks)
    return _numpy_blocks(seed, position, choice, blocks)


def _numpy_blocks(seed: int, position: int, choice: int, blocks: npt.NDArray[Any]) -> Uint32Array:
    even, odd = np.zeros((2, len(blocks)), np.uint64), np.zeros((2, len(blocks)), np.uint64)
    even[0], odd[0], even[1] = position & MAX_BITS, choice & MAX_BITS, blocks
    out = np.empty((len(blocks), 4), np.uint32)
    _philox(even, odd, seed & MAX_BITS, seed >> 32, out)
    return out


def noise_bits(seed: int, position: int, token_ids: npt.NDArray[Any], choice: int = 0) -> Uint32Array:
    """The random bits of ``token_ids`` ((n,) ints >= 0) at one position. Returns (n,) uint32.

    position: index of the token in the whole sequence, prompt included, so that a resumed or replayed session draws the
    same noise. choice: tells several draws at one position apart; the served sequence is choice 0.
    """
    ids = np.asarray(token_ids, np.int64)
    highest = int(ids.max(initial=0))
    if 4 * ids.size > highest:
        return _blocks(seed, position, choice, np.arange(highest // 4 + 1)).reshape(-1)[ids]
    return np.take_along_axis(_blocks(seed, position, choice, ids >> 2), (ids & 3)[:, None], axis=1)[:, 0]


def all_bits(seed: int, position: int, vocab_size: int, choice: int = 0) -> Uint32Array:
    """``noise_bits`` of every token of the vocabulary: (vocab_size,) uint32."""
    return _blocks(seed, position, choice, np.arange((vocab_size + 3) // 4)).reshape(-1)[:vocab_size]


def gumbel(bits: Uint32Array) -> Float64Array:
    """Standard Gumbel variates: v = (bits + 1/2) / 2**32, G = -log(-log(1 - v)). Falls as bits grow, 22.9 to -3.1.

    The fine end of v is the large end of G, so a token of probability 1e-9 is still drawn at its due rate.
    """
    v = (bits.astype(np.float64) + 0.5) * 2.0**-32
    return np.asarray(-np.log(-np.log1p(-v)))


def bits_reaching(noise: float) -> int:
    """A bound on bits: every ``b`` above it has ``gumbel(b) < noise``. Errs upwards by a few bits, never downwards."""
    if noise < -3.0:
        return MAX_BITS
    v = -math.expm1(-math.exp(-noise))
    return min(MAX_BITS, int(v * 2.0**32 * (1.0 + 1e-9)) + 1)


def keyed_noise_at(seed: int, position: int, token_ids: npt.NDArray[Any], choice: int = 0) -> Float64Array:
    """G of ``token_ids`` at a position: (n,) float64. Arguments as for ``noise_bits``."""
    return gumbel(noise_bits(seed, position, token_ids, choice))


def keyed_noise(seed: int, position: int, vocab_size: int, choice: int = 0) -> Float64Array:
    """G of the whole vocabulary at a position: (vocab_size,) float64."""
    return gumbel(all_bits(seed, position, vocab_size, choice))

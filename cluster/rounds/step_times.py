"""What guesses cost in an engine whose steps are only seen from outside, and how many of them pay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.core.warp import Float64Array

MEMORY = 0.99  # of what was seen counts after one step more
OUTLIER = 3.0  # times the expected: something else took the time ...
MOST_OUTLIERS = 8  # ... unless so many steps in a row did: then it is what is expected that is wrong
WIDEST = 100.0  # variance in any direction, at most: what was not seen for long is not known, but no less than that
MIN_STEPS = 8  # before outliers are told, and before anything is declined
LEAST_FIXED = 0.05  # of the first step's seconds
PROBE_STEPS = 64  # where guesses do not pay, one step in so many tries them again


class StepTimes:
    """Seconds of a step: fixed + per row + what it costs to verify anything at all; least squares that forget."""

    def __init__(self) -> None:
        self._steps = 0
        self._outliers = 0  # in a row
        self._unit = 0.0
        self._weights = [0.0, 0.0, 0.0]
        self._spread = np.diag([WIDEST, 1.0, 1.0])  # the prior: rows and verifying cost nothing

    @property
    def known(self) -> bool:
        return self._steps >= MIN_STEPS

    def observe(self, rows: int, drafts: int, seconds: float) -> None:
        """A step of ``rows`` sessions and ``drafts`` guesses took so many seconds."""
        self._unit = self._unit or seconds
        at = np.array([1.0, (rows + drafts) / 8, float(drafts > 0)])
        error = seconds / self._unit - float(at @ self._weights)
        outlier = self.known and seconds > OUTLIER * self.seconds(rows, drafts)
        self._outliers = self._outliers + 1 if outlier else 0
        if outlier and self._outliers < MOST_OUTLIERS:
            return
        gain = self._spread @ at / (MEMORY + at @ self._spread @ at)
        self._weights = (self._weights + gain * error).tolist()
        self._spread = _bounded((self._spread - np.outer(gain, at @ self._spread)) / MEMORY)
        self._steps += 1

    def seconds(self, rows: int, drafts: int) -> float:
        """Expected; 0 before the first step."""
        fixed, per_row, verifying = self._weights  # plain numbers: asked for every guess
        units = max(fixed, LEAST_FIXED) + max(per_row, 0.0) * (rows + drafts) / 8
        return self._unit * (units + max(verifying, 0.0) if drafts else units)


def _bounded(spread: Float64Array) -> Float64Array:
    """A covariance whose variances are at most ``WIDEST``, and which still is one: element by element it would not be.

    Only the directions that are too wide are cut. Were all scaled down, steps that are always alike would in the end be
    taken for known for ever, and nothing more be learnt from them.
    """
    if np.trace(spread) <= WIDEST:
        return spread
    variances, directions = np.linalg.eigh(spread)
    bounded: Float64Array = (directions * np.minimum(variances, WIDEST)) @ directions.T
    return bounded


class ChainLengths:
    """How many guesses of each row's chain a step gets: those that raise tokens per second, none where none does."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self._declined = 0

    def choose(self, rows: int, chains: Sequence[Sequence[float]]) -> list[int]:
        """``chains``: probability that the target follows the chain down to each guess, never growing.

        rows: of the step, those without a chain included.
        """
        offered = sorted(((p, index) for index, chain in enumerate(chains) for p in chain), reverse=True)
        lengths, tokens, taken = [0] * len(chains), float(rows), 0
        for probability, index in offered:
            now, then = self._times.seconds(rows, taken), self._times.seconds(rows, taken + 1)
            if taken and self._times.known and (tokens + probability) * now <= tokens * then:
                break
            tokens, taken = tokens + probability, taken + 1
            lengths[index] += 1
        if not taken or not self._times.known:
            return lengths
        pays = tokens * self._times.seconds(rows, 0) > rows * self._times.seconds(rows, taken)
        self._declined = 0 if pays else self._declined + 1
        if pays or self._declined % PROBE_STEPS == 0:
            return lengths
        return [0] * len(chains)

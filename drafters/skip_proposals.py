"""Which set of sub-layers to try next: at random, near the best one known, or by Bayesian optimisation.

A space is the sets of ``count`` sub-layers out of the 2 (L - 2) of the inner layers; the first and the last layer stay.
Every proposal is a pure function of the space, the seed and what was scored before, so that a search can be broken off
and taken up again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from cluster.core.errors import ConfigError

SkipSet = frozenset[int]
ProposerName = Literal["mutate", "random", "bayes"]

TWO_SWAPS = 0.3  # of the mutations exchange two sub-layers
NEW_RANDOM = 8  # bayes: one proposal in so many is random, as are the first ones
MOST_SCORES = 150  # older ones are forgotten: fitting takes time with their number, and texts change


class Score(NamedTuple):
    """``matchness``: the incumbent's, plus how much better the set did on the same tokens."""

    skip: SkipSet
    matchness: float


@dataclass(frozen=True, slots=True)
class SkipSpace:
    """Sets of ``count`` sub-layers of a model with ``num_layers``. Raises ``ConfigError`` where there are none."""

    num_layers: int
    count: int

    def __post_init__(self) -> None:
        most = 2 * max(0, self.num_layers - 2)
        if not 0 <= self.count <= most:
            raise ConfigError(f"skip: {self.count} is outside [0, {most}], what {self.num_layers} layers allow")

    @property
    def units(self) -> range:
        """The sub-layers that may be left out: 2 * layer is a layer's attention, 2 * layer + 1 its MLP."""
        return range(2, 2 * self.num_layers - 2)

    def __contains__(self, skip: SkipSet) -> bool:
        return len(skip) == self.count and all(unit in self.units for unit in skip)


class Proposer(Protocol):
    def propose(self, incumbent: SkipSet, scores: Sequence[Score], trial: int) -> SkipSet:
        """The set to score in the ``trial``-th place. ``scores``: what was scored so far, oldest first."""
        ...


def make_proposer(name: ProposerName, space: SkipSpace, seed: int = 0) -> Proposer:
    """Raises ``ConfigError`` for ``bayes`` where its library is not installed."""
    kinds: dict[ProposerName, Callable[[SkipSpace, int], Proposer]] = {
        "mutate": MutatingProposer,
        "random": RandomProposer,
        "bayes": BayesProposer,
    }
    return kinds[name](space, seed)


class RandomProposer:
    """Any set, all equally likely."""

    def __init__(self, space: SkipSpace, seed: int) -> None:
        self._space, self._seed = space, seed

    def propose(self, incumbent: SkipSet, scores: Sequence[Score], trial: int) -> SkipSet:
        draw = random.Random(f"{self._seed}/{trial}")
        return frozenset(draw.sample(self._space.units, self._space.count))


class MutatingProposer:
    """The incumbent with one sub-layer, or two, exchanged; none that was scored before where that can be helped."""

    def __init__(self, space: SkipSpace, seed: int) -> None:
        self._space, self._seed = space, seed

    def propose(self, incumbent: SkipSet, scores: Sequence[Score], trial: int) -> SkipSet:
        draw = random.Random(f"{self._seed}/{trial}")
        known = {score.skip for score in scores[-MOST_SCORES:]}
        skip = incumbent
        for _ in range(16):
            kept = [unit for unit in self._space.units if unit not in incumbent]
            swaps = min(2 if draw.random() < TWO_SWAPS else 1, len(kept), len(incumbent))
            out, into = draw.sample(sorted(incumbent), swaps), draw.sample(kept, swaps)
            skip = incumbent.difference(out).union(into)
            if skip not in known:
                break
        return skip


class BayesProposer:
    """Optuna's tree-structured Parzen estimator over one number in [0, 1] per sub-layer; the ``count`` largest skip.

    Scored sets count as points of zeros and ones, whoever proposed them: the form of SWIFT's own optimiser, with a
    model that takes milliseconds where a Gaussian process over so many dimensions takes seconds.
    """

    def __init__(self, space: SkipSpace, seed: int) -> None:
        try:
            import optuna
        except ModuleNotFoundError:
            raise ConfigError("proposals: bayes needs optuna: pip install '.[search]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna: Any = optuna
        self._space, self._seed = space, seed
        self._random = RandomProposer(space, seed)
        self._unit = optuna.distributions.FloatDistribution(0.0, 1.0)

    def propose(self, incumbent: SkipSet, scores: Sequence[Score], trial: int) -> SkipSet:
        if trial % NEW_RANDOM == 0 or len(scores) < NEW_RANDOM:
            return self._random.propose(incumbent, scores, trial)
        optuna, names = self._optuna, [str(unit) for unit in self._space.units]
        # The number that starts the sampler is a fresh one each time, so nothing but the scores needs to be kept.
        sampler = optuna.samplers.TPESampler(seed=self._seed * 100_003 + trial, n_startup_trials=1)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for score in scores[-MOST_SCORES:]:
            point = {str(unit): float(unit in score.skip) for unit in self._space.units}
            space = dict.fromkeys(names, self._unit)
            study.add_trial(optuna.trial.create_trial(params=point, distributions=space, value=score.matchness))
        asked = study.ask(dict.fromkeys(names, self._unit)).params
        best = sorted(self._space.units, key=lambda unit: (-asked[str(unit)], unit))
        return frozenset(best[: self._space.count])

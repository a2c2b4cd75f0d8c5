"""Where guesses come from: the engine's own drafter, remote stages, or nowhere; whichever is fastest.

A mode's speed is measured, with everything it costs: waiting, calls, a slower step. The others are looked at again as
long as looks are cheap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

PLAIN, LOCAL, REMOTE, ALTERNATING, MIXED = "plain", "local", "remote", "alternating", "mixed"
"""Alternating: remote stages draft for half of the sessions while the others are verified. Mixed rounds, in which some
sessions' stages were ready and others' will be, are measured for none."""

FROM_STAGES = (REMOTE, ALTERNATING)

HYSTERESIS = 1.05  # another mode must be faster than the one in use by this factor
PLAIN_HANDICAP = 0.93  # the usual way comes down to plain decoding by itself where guesses do not pay
ALTERNATION_GAIN = 1.05  # two groups must promise to be so much faster than one, to be tried
MIN_ROUNDS = 6  # measured rounds before a mode's speed counts ...
LEARNING_ROUNDS = 64  # ... and before that of the first with guesses does, which learns meanwhile what they are worth
TRIAL_PATIENCE = 8  # times as many rounds, measured or not, end a mode's trial
LOOK_GAP = 48  # rounds between two looks at modes not in use, at least
LOOK_ROUNDS = 4  # how long a look is; its first round only brings the drafters up to date
LOOK_COST = 0.01  # share of the time that looks may cost
INTERRUPTED = 16.0  # plain steps: a round that took longer was held up by something else, and counts as so long
MEMORY = 0.995  # of a mode's earlier rounds is left after one more: how much guesses win varies from round to round
RECENT = 0.998  # what counts as "the time" fades by this much a round


@dataclass(slots=True)
class ModeChooser:
    """Speed is relative to plain decoding of as many sessions, so that modes compare although load changes.

    ``learning_rounds``: before the speed of the first mode with guesses counts.
    """

    learning_rounds: int = LEARNING_ROUNDS
    tokens: dict[str, float] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    rounds: Counter[str] = field(default_factory=Counter)
    tried: Counter[str] = field(default_factory=Counter)
    offered: Sequence[str] = ()
    in_use: str = ""
    last: str = ""
    looking_at: str = ""
    look_left: int = 0
    rounds_since_look: int = 0
    num_looks: int = 0
    spent: float = 0.0
    lost: float = 0.0

    def observe(self, mode: str, tokens: float, steps: float) -> None:
        """A round in ``mode`` yielded ``tokens`` per session and took as long as ``steps`` plain steps."""
        steps = min(steps, INTERRUPTED)
        fastest = max((name for name in self.offered if self.steps.get(name)), key=self.speed, default=mode)
        self.spent = RECENT * self.spent + steps
        self.lost *= RECENT
        if mode != fastest and self.speed(fastest) > 0.0:
            self.lost = max(0.0, self.lost + steps - tokens / self.speed(fastest))
        switched, self.last = mode != self.last, mode
        if not switched:
            self.tokens[mode] = MEMORY * self.tokens.get(mode, 0.0) + tokens
            self.rounds[mode] += 1
            self.steps[mode] = MEMORY * self.steps.get(mode, 0.0) + steps

    def choose(self, modes: Sequence[str], measurable: bool = True) -> str:
        """The best of ``modes``, or another that is due for a look; of those that are known where nothing can be
        learnt from this round."""
        self.offered = modes
        if not measurable:
            return max((mode for mode in modes if self.rounds[mode] >= MIN_ROUNDS), key=self.speed, default=modes[0])
        best = self.best(modes)
        if self.on_trial(best, modes):
            self.tried[best] += 1
        else:
            self.in_use = best
        others = [mode for mode in modes if mode != best]
        if self.look_left and self.looking_at in modes:
            self.look_left -= 1
            return self.looking_at
        self.rounds_since_look += 1
        due = self.rounds_since_look >= LOOK_GAP and self.lost <= LOOK_COST * self.spent
        if not others or not due:
            return best
        self.looking_at = others[self.num_looks % len(others)]
        self.num_looks += 1
        self.look_left, self.rounds_since_look = LOOK_ROUNDS - 1, 0
        return self.looking_at

    def best(self, modes: Sequence[str]) -> str:
        """A mode hardly measured, else the fastest; the one in use (at first ``modes[0]``) must be clearly beaten."""
        if unknown := [mode for mode in modes if self.on_trial(mode, modes)]:
            return unknown[0]
        usual = modes[0]
        kept = self.in_use if self.in_use in modes else usual

        def value(mode: str) -> float:
            handicap = PLAIN_HANDICAP if mode == PLAIN and mode != usual else 1.0
            return self.speed(mode) * handicap * (HYSTERESIS if mode == kept else 1.0)

        return max(modes, key=value)

    def on_trial(self, mode: str, modes: Sequence[str]) -> bool:
        """Whether too little is known of it. Where rounds can hardly be measured, a trial ends all the same."""
        learning = next((each for each in modes if each != PLAIN), None)
        wanted = self.learning_rounds if mode == learning else MIN_ROUNDS
        return self.rounds[mode] < wanted and self.tried[mode] < TRIAL_PATIENCE * wanted

    def speed(self, mode: str) -> float:
        """Tokens per session and plain step of late; 0 where the mode was never measured."""
        return self.tokens.get(mode, 0.0) / self.steps[mode] if self.steps.get(mode) else 0.0


def alternation_pays(draft_s: float, whole_s: float, half_s: float) -> bool:
    """Whether two groups of sessions in turn should be faster than all in one step.

    ``draft_s``: from an ask to its trees. ``whole_s``, ``half_s``: of a step with all sessions, and with half of them.
    In one group a round is drafted, then verified. Of two, one is drafted for while the other is verified: a round of
    both lasts two half steps, or drafting and a half step where that is longer. Weights are read twice for it, so this
    is for steps bound by arithmetic.
    """
    return ALTERNATION_GAIN * max(2.0 * half_s, draft_s + half_s) < draft_s + whole_s

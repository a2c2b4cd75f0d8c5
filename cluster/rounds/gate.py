"""Which sessions the drafter in the engine's own thread is asked for: those where asking has paid of late.

Asking costs time even where no guess is verified. So a session's worth is measured: tokens its guesses won, less what
their rows cost, for each time it was asked. Where that falls short of what asking costs, the drafter sleeps, and is
asked again now and then, at a small and fixed share of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FAST_RATE = 0.08  # notices that a text began, or ceased, to repeat itself
SLOW_RATE = 0.01  # remembers rare, large wins
PROBE_SHARE = 0.01  # of the time goes to asking for sessions where that did not pay
COLD_ASKS = 8  # the first asks find nothing in memory: what the least of them took is what asking costs
COST_RATE = 0.1
INTERRUPTED = 4.0  # an ask that took so many times what asks take says no more than that
PRIOR_WORTH = 0.5  # tokens per ask of a drafter nothing is known of ...
PRIOR_COUNT = 8  # ... which weighs as much as so many asks
TYPICAL_RATE = 0.003


@dataclass(slots=True)
class _Worth:
    """Net tokens per ask: lately, and in the long run over ``count`` asks."""

    fast: float = PRIOR_WORTH
    slow: float = PRIOR_WORTH
    count: int = PRIOR_COUNT

    def observe(self, tokens: float, slow_rate: float = SLOW_RATE) -> None:
        self.count += 1
        self.fast += max(FAST_RATE, 1.0 / self.count) * (tokens - self.fast)
        self.slow += max(slow_rate, 1.0 / self.count) * (tokens - self.slow)


class AskGate:
    """Pure bookkeeping over what the caller measures; times in seconds, worth in tokens."""

    def __init__(self) -> None:
        self.seconds_per_ask = 0.0  # not known at first: asking is free until it is
        self._cold: list[float] = []
        self._typical = _Worth()
        self._worth: dict[str, _Worth] = {}
        self._credit = 0.0

    def choose(self, session_ids: Sequence[str], token_seconds: float) -> set[str]:
        """Those to ask for now. ``token_seconds``: what one token costs without guessing."""
        price = self.seconds_per_ask / token_seconds
        paying = {session_id for session_id in session_ids if self._pays(session_id, price)}
        if len(paying) == len(session_ids):
            return paying
        probe = self.seconds_per_ask * (len(session_ids) - len(paying))
        self._credit = min(self._credit, 2.0 * probe)
        if self._credit < probe:
            return paying
        self._credit -= probe
        return set(session_ids)

    def asked(self, sessions: int, seconds: float) -> None:
        """One call for so many sessions took ``seconds``."""
        per_ask, known = seconds / sessions, self.seconds_per_ask
        if known:
            self.seconds_per_ask += COST_RATE * (min(per_ask, INTERRUPTED * known) - known)
            return
        self._cold.append(per_ask)
        if len(self._cold) == COLD_ASKS:
            self.seconds_per_ask = min(self._cold)

    def observe(self, session_id: str, tokens: float) -> None:
        """An asked session's guesses won so many tokens, net of their rows."""
        self._of(session_id).observe(tokens)
        self._typical.observe(tokens, TYPICAL_RATE)

    def tick(self, seconds: float) -> None:
        """A round took ``seconds``: a share of them may go to probes."""
        self._credit += PROBE_SHARE * seconds

    def forget(self, session_id: str) -> None:
        self._worth.pop(session_id, None)

    def _pays(self, session_id: str, price: float) -> bool:
        worth = self._of(session_id)
        return max(worth.fast, worth.slow) > price

    def _of(self, session_id: str) -> _Worth:
        if session_id not in self._worth:
            typical = self._typical.slow
            self._worth[session_id] = _Worth(typical, typical)
        return self._worth[session_id]

"""Whether remote stages are leased and asked: as far as rounds with their guesses turn out to be the fastest.

Every engine that can reach draft workers decides it here, whatever else it has: a drafter of its own, or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from cluster.rounds.modes import ALTERNATING, FROM_STAGES, MIXED, REMOTE, ModeChooser
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.session_drafts import Drafted

WORTH_A_LEASE = 0.9  # of the fastest way's speed must remote stages reach for sessions to hold their workers
EXPEDITION_GAP_S = 120.0  # else, and where nothing is known of them, this often ...
EXPEDITION_S = 5.0  # ... sessions get workers for so long: following a session costs a drafter its prefill


class RemoteUse:
    """Which way the next round's guesses come, and the asking of the stages of ``pipeline``. Engine thread only."""

    def __init__(
        self,
        modes: ModeChooser,
        usual: Sequence[str],
        pipeline: Pipeline | None,
        clock: Callable[[], float],
        always: bool = False,
        named_only: bool = False,
    ) -> None:
        """``modes``: what the choice goes by, which may be exchanged. ``usual``: what the engine can do by itself, the
        likely best first. ``always``: ask whoever can be reached, fast or not. ``named_only``: no session gets workers
        that did not name their stage."""
        self.mode = usual[0]
        self.modes = modes
        self._usual = list(usual)
        self._pipeline = pipeline
        self._clock = clock
        self._always = always
        self._named_only = named_only
        self._expedition_s = -math.inf

    def ask(
        self,
        free: Sequence[tuple[Drafted, int]],
        named: Sequence[tuple[Drafted, Sequence[str], int]] = (),
        two_groups: bool = False,
        measurable: bool = True,
    ) -> None:
        """``free``: sessions whose way is chosen here, and how many nodes each may have; ``named``: those whose client
        chose their stages. ``two_groups``: whether alternating is a way; ``measurable``: whether the next
        round will tell how fast its way is. Afterwards ``mode`` is how the free ones will
        get their guesses."""
        session_ids = {session.id for session, _ in free}
        reachable = self._pipeline is not None and (self._always or self._pipeline.reachable(session_ids))
        if free:
            self.mode = self._choose(reachable, two_groups, measurable)
        if self._pipeline is not None:
            under_way = self._ask(self._pipeline, free, named, reachable, two_groups)
            without = session_ids - under_way
            if self.mode in FROM_STAGES and without and without == session_ids:
                self.mode = self._fallback()
            elif self.mode in FROM_STAGES and not all(map(self._pipeline.stranded, without)):
                # Who is stranded will have no trees in the next rounds either: a round without theirs shows what remote
                # stages yield at this load. Were it measured for none, a trial of them would never end.
                self.mode = MIXED

    def _ask(
        self,
        pipeline: Pipeline,
        free: Sequence[tuple[Drafted, int]],
        named: Sequence[tuple[Drafted, Sequence[str], int]],
        reachable: bool,
        two_groups: bool,
    ) -> set[str]:
        """Returns the ids of those for which trees are under way."""
        session_ids = {session.id for session, _ in free}
        if free and self._worth_leases(FROM_STAGES if two_groups else (REMOTE,)):
            for session_id in session_ids:
                pipeline.lease(session_id, pipeline.stages)
        for session, stages, _ in named:
            pipeline.lease(session.id, stages)
        # Where every worker is left out, asking is for the probe, which alone gets through.
        probing = not reachable and pipeline.broken
        stages = pipeline.stages if self.mode in FROM_STAGES or probing else ()
        # Until the stages follow every session, they are sent starts and asked for nothing: a round that waits for some
        # sessions' trees and not for others' would cost time and tell nothing.
        together = self._always or probing or pipeline.follows(session_ids)
        return pipeline.ask([*((session, stages, nodes if together else 0) for session, nodes in free), *named])

    def _choose(self, reachable: bool, two_groups: bool, measurable: bool) -> str:
        if self._always:
            return (ALTERNATING if two_groups else REMOTE) if reachable else self._usual[0]
        remote = () if not reachable else FROM_STAGES if two_groups else (REMOTE,)
        return self.modes.choose([*self._usual, *remote], measurable)

    def _fallback(self) -> str:
        return self._usual[0] if self._always else self.modes.best(self._usual)

    def _worth_leases(self, ways: Sequence[str]) -> bool:
        """Whether sessions shall hold workers of the remote stages: they pay, or it is time to see if they would.
        ``ways``: in which they may be used now."""
        modes, now = self.modes, self._clock()
        if self._always:
            return True
        if self._named_only:
            return False
        remote = max(map(modes.speed, ways))
        fastest = max(remote, *map(modes.speed, self._usual))
        if modes.rounds[REMOTE] and (
            modes.on_trial(REMOTE, [*self._usual, *ways]) or remote >= WORTH_A_LEASE * fastest
        ):
            return True
        if now - self._expedition_s > EXPEDITION_GAP_S:
            self._expedition_s = now
        return now - self._expedition_s < EXPEDITION_S

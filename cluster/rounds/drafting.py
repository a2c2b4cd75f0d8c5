"""Where a round's guesses come from: the drafter in the engine's own thread, the remote stages, or nowhere.

It keeps both informed about every session and asks them; which way is used, and whom it is worth asking for, are the
governor's choices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from cluster.core.config import EngineConfig
from cluster.core.token_tree import TokenTree
from cluster.core.types import Commit
from cluster.rounds.governor import Governor
from cluster.rounds.guard import GuardedDrafter
from cluster.rounds.modes import ALTERNATING, LOCAL, MIXED, PLAIN, alternation_pays
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.remote_use import RemoteUse
from cluster.rounds.session import Session
from drafters.base import Ask

NODES_RATE = 0.05  # weight of the newest tree in how large those of remote stages are


class Drafting:
    """The sessions' drafters. Engine thread only; nothing here blocks longer than the deadline for trees."""

    def __init__(
        self,
        config: EngineConfig,
        governor: Governor,
        local: GuardedDrafter | None,
        pipeline: Pipeline | None,
        clock: Callable[[], float],
    ) -> None:
        self._remote_use = RemoteUse(
            governor.modes,
            [LOCAL, PLAIN] if local is not None else [PLAIN],
            pipeline,
            clock,
            always=governor.always,
            named_only=config.remote_use == "named",
        )
        self._config = config
        self._governor = governor
        self._local = local
        self._pipeline = pipeline
        self._asked: set[str] = set()  # sessions the local drafter was asked for in this round, by the gate's choice
        self._remote: set[str] = set()  # sessions whose guesses of this round the remote stages made
        self._remote_nodes = 0.0  # of one session's tree, of late, where remote stages made it
        self._round = 0
        self._last_round: dict[str, int] = {}  # that a session was in
        self._named: set[str] = set()  # sessions whose client chose where their guesses come from
        self._two_groups = False
        self.sitting_out = 0  # sessions that are ready, but not of the group whose turn it is

    @property
    def mode(self) -> str:
        """How sessions that leave it to the engine get their next guesses."""
        return self._remote_use.mode

    @property
    def round_mode(self) -> str:
        """How those of the round under way got theirs: one in which nobody sits out is no turn of two groups."""
        return MIXED if self.mode == ALTERNATING and not self.sitting_out else self.mode

    @property
    def measurable(self) -> bool:
        """Whether rounds tell how fast their way is: who named stages slows them down for reasons of its own."""
        return not self._named

    # --- sessions come and go

    def begin(self, session: Session) -> None:
        if self.cap(session) == 0:
            return
        if self._local is not None:
            owner = session.request.owner
            self._local.begin(session.id, session.tokens, session.params, session.prompt_len, owner)
        if self._pipeline is not None:
            self._pipeline.open(session, session.speculation.stages or ())
        if not session.speculation.engine_chooses:
            self._named.add(session.id)

    def end(self, session: Session, last: Commit | None = None) -> None:
        """``last``: what the session emitted in the round that ended it: drafters may learn from whole outputs."""
        if self._local is not None:
            if last is not None:
                self._local.commit(session.id, last.token_ids)
            self._local.end(session.id)
        if self._pipeline is not None:
            self._pipeline.close(session.id)
        self._named.discard(session.id)
        self._governor.forget(session.id)
        self._last_round.pop(session.id, None)

    # --- the round

    def ready(self, decoding: Sequence[Session], busy: bool) -> list[Session]:
        """Those to be in the next step. Who waits for stages that its client named does not hold the others up; where
        two groups take turns, it is the half that was not in a step for longest.

        busy: whether the step has prompts to read, so that nobody else need be in it.
        """
        now = self._free_to_go(decoding, busy)
        free = all(session.speculation.engine_chooses and self.cap(session) for session in now)
        self._two_groups = free and self._may_alternate(now)
        group = now
        if self.mode == ALTERNATING and self._two_groups and not busy:  # a step full of prompts takes as long for half
            rested = [session for session in now if self._last_round.get(session.id, 0) < self._round] or now
            group = sorted(rested, key=lambda s: self._last_round.get(s.id, 0))[: (len(now) + 1) // 2]
        self.sitting_out = len(now) - len(group)
        self._round += 1
        self._last_round |= dict.fromkeys((session.id for session in group), self._round)
        return group

    def guess(self, sessions: Sequence[Session], context: float) -> list[TokenTree]:
        """One tree per session, within its own limits: the remote stages' where it came in time, else a local guess."""
        self._asked = set()
        found: dict[str, TokenTree] = {}
        if self._pipeline is not None and sessions:
            found = self._pipeline.collect(sessions, self._deadline(len(sessions) + self.sitting_out, context))
        self._remote = set(found)
        caps = {session.id: self.cap(session) for session in sessions}
        if self._local is not None:
            free = [s for s in sessions if s.id not in found and caps[s.id] > 0 and self._may_ask_local(s)]
            found |= self._ask_local(self._local, free, caps, len(sessions), context)
        return [
            found[session.id].prune(caps[session.id], session.max_depth) if session.id in found else TokenTree.empty()
            for session in sessions
        ]

    def verified(self, session: Session, tree: TokenTree, accepted: int, price: float) -> None:
        """Of a session's guesses ``tree`` was verified, and so much accepted; ``price``: tokens that its rows cost."""
        nodes = len(tree)
        if self._pipeline is not None and session.id in self._remote:
            self._pipeline.verified(session.id, tree)
            self._remote_nodes += NODES_RATE * (nodes - self._remote_nodes)
        if session.id in self._asked:
            self._governor.gate.observe(session.id, accepted - price)

    def ask(self, commits: Sequence[tuple[Session, Commit]]) -> None:
        """Tell the local drafter what was committed, and ask the remote stages where the next round shall use them."""
        if self._local is not None:
            for session, commit in commits:
                self._local.commit(session.id, commit.token_ids)
        drafted = [(session, cap) for session, _ in commits if (cap := self.cap(session)) > 0]
        free = [(session, cap) for session, cap in drafted if session.speculation.engine_chooses]
        wishes = [(session, session.speculation.stages, cap) for session, cap in drafted]
        named = [(session, stages, cap) for session, stages, cap in wishes if stages is not None]
        self._remote_use.ask(free, named, self._two_groups, self.measurable)

    def cap(self, session: Session) -> int:
        """Nodes the session's tree may have."""
        wish = session.speculation
        if not wish.enabled or session.max_depth <= 0:
            return 0
        return self._config.max_nodes if wish.max_nodes is None else min(wish.max_nodes, self._config.max_nodes)

    def _free_to_go(self, decoding: Sequence[Session], busy: bool) -> list[Session]:
        """All but those that wait for their own stages' trees."""
        if self._pipeline is None or self._governor.always:
            return list(decoding)
        if not any(session.speculation.stages for session in decoding):
            return list(decoding)
        context = sum(session.base for session in decoding) / len(decoding)
        pipeline, patience = self._pipeline, self._deadline(len(decoding), context)
        now = [s for s in decoding if not s.speculation.stages or not pipeline.awaits(s.id, patience)]
        return now if now or busy else list(decoding)

    def _may_alternate(self, sessions: Sequence[Session]) -> bool:
        """Whether two groups of these sessions are a way: by configuration, or by what a step and a draft take."""
        count = len(sessions)
        if self._pipeline is None or count < 2 or self._config.session_groups != "auto":
            return count > 1 and self._config.session_groups == "two"
        cost, width = self._governor.cost, 1.0 + self._remote_nodes
        context = sum(session.base for session in sessions) / count
        whole, half = (cost.at(round(n * width), context, n) + cost.overhead for n in (count, (count + 1) // 2))
        return alternation_pays(self._pipeline.reply_s, whole, half)

    def _may_ask_local(self, session: Session) -> bool:
        """Whether the client named the local drafter's stage, or left the choice to the engine, which guesses now."""
        stages = session.speculation.stages
        if stages is None:
            return self.mode != PLAIN
        return self._local is not None and self._local.stage.name.lower() in stages

    def _ask_local(
        self, local: GuardedDrafter, sessions: Sequence[Session], caps: Mapping[str, int], width: int, context: float
    ) -> dict[str, TokenTree]:
        """``width``: sessions in the step, all of which wait for what these cost."""
        if not sessions:
            return {}
        gate, always = self._governor.gate, self._governor.always
        chosen = {session.id for session in sessions if always or not session.speculation.engine_chooses}
        open_to_choice = [session.id for session in sessions if session.id not in chosen]
        chosen |= gate.choose(open_to_choice, self._governor.token_seconds(width, context))
        least = self._governor.least_score(width, context)
        asks = [Ask(s.id, caps[s.id], s.max_depth, min_score=least) for s in sessions if s.id in chosen]
        if not asks:
            return {}
        start = time.perf_counter()
        trees = local.propose(asks, {})
        gate.asked(len(asks), time.perf_counter() - start)
        self._asked = chosen.intersection(open_to_choice)
        return trees

    def _deadline(self, sessions: int, context: float) -> float:
        config = self._config
        wait = 1e3 * config.draft_deadline_steps * self._governor.cost.at(sessions, context, sessions)
        return max(config.draft_deadline_min_ms, min(config.draft_deadline_max_ms, wait)) / 1e3

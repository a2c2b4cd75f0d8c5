"""The loop every round goes through: admit, draft, verify, commit. One thread; only it touches the verifier.

``step`` is the round of ``docs/round.md``. Sessions wait in order of arrival (replays first), run once they have a KV
slot, prefill in chunks beside the sessions that decode, and leave through ``_release`` whatever ended them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.core.accept import Accepted
from cluster.core.config import EngineConfig
from cluster.core.errors import EngineFailed, Overloaded, PacelineError
from cluster.core.token_tree import TokenTree
from cluster.core.types import Commit, FinishReason, Origin, StreamItem
from cluster.engine.verifier import Prefill, StepTimes, Verifier, Verify
from cluster.rounds.governor import Calibration, CostCurve, ModeChooser, choose_nodes
from cluster.rounds.guard import GuardedDrafter
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.session import Phase, Session
from drafters.base import Ask, Drafter

log = logging.getLogger(__name__)

PLAIN, LOCAL, REMOTE, MIXED = "plain", "local", "remote", "mixed"
"""Where a round's guesses come from, as ``ModeChooser`` sees it; mixed rounds are measured for none."""

CHEAP = 0.05  # of a plain step: what a local drafter may cost without being questioned


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step yielded for one session: an item, or the error that ended it."""

    session: Session
    item: StreamItem | None = None
    error: PacelineError | None = None


@dataclass(slots=True)
class RoundTimes:
    """Seconds since start-up, by part of the round."""

    draft: float = 0.0
    forward: float = 0.0
    accept: float = 0.0
    other: float = 0.0
    steps: int = 0


class Scheduler:
    """Sessions of one target. ``local`` guesses in this thread; ``pipeline`` reaches drafters elsewhere."""

    def __init__(
        self,
        config: EngineConfig,
        verifier: Verifier,
        curve: CostCurve,
        local: Drafter | None = None,
        pipeline: Pipeline | None = None,
        slots: dict[str, int] | None = None,
    ) -> None:
        """``slots`` is kept as the map from running session to KV slot, for drafters that work on the target's KV."""
        self._config = config
        self._verifier = verifier
        self._curve = curve
        self._local = None if local is None else GuardedDrafter(local, verifier.rank.config.vocab_size)
        self._pipeline = pipeline
        self._calibration = Calibration()
        self._modes = ModeChooser()
        self._local_seconds = 0.0  # of a call to the local drafter, of late
        self._mode = LOCAL if local is not None else PLAIN
        self._waiting: deque[Session] = deque()
        self._running: list[Session] = []
        self._prefilled: dict[str, int] = {}
        self._slots = {} if slots is None else slots
        self.times = RoundTimes()
        self.last_choice = ""

    # --- sessions come and go

    def submit(self, session: Session) -> Outcome | None:
        """Queue a session. Raises ``Overloaded`` where too many wait; an outcome where it is over before it began.

        A replay was admitted before: it is not refused, and waits for other replays only.
        """
        if session.finish_reason is not None:
            session.phase = Phase.FINISHED
            return Outcome(session, session.closing_item())
        if session.request.epoch > 0:
            self._waiting.insert(sum(other.request.epoch > 0 for other in self._waiting), session)
        elif len(self._waiting) >= self._config.max_waiting + self._verifier.rank.kv.num_free:
            raise Overloaded(f"{len(self._waiting)} requests wait already, at most {self._config.max_waiting}")
        else:
            self._waiting.append(session)
        return None

    def abort(self, session: Session) -> None:
        """Drop a session wherever it stands; its KV slot is free when this returns."""
        if session in self._waiting:
            self._waiting.remove(session)
        elif session in self._running:
            self._release(session)
        session.finish_reason = session.finish_reason or FinishReason.ABORT
        session.phase = Phase.FINISHED

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    # --- the round

    def step(self) -> list[Outcome]:
        """One round: draft (trees that are there), verify, accept, commit. Empty where nothing runs."""
        self._admit()
        if not self._running:
            return []
        start, mode = time.perf_counter(), self._mode
        decoding = [session for session in self._running if session.phase is Phase.DECODE]
        trees = self._budget(self._draft(decoding))
        drafted = time.perf_counter()
        verifies = [
            Verify(s.slot, s.tokens[-1], tree, s.params, s.history, s.base, s.stop_ids)
            for s, tree in zip(decoding, trees)
        ]
        prefills = self._prefill_chunks(sum(len(tree) + 1 for tree in trees))
        blocks, spent = self._verifier.step([chunk for _, chunk in prefills], verifies)
        outcomes, commits = self._commit(decoding, trees, blocks)
        self._advance_prefill(prefills)
        self._ask_drafters(commits)
        self._account(mode, start, drafted, spent, outcomes, bool(prefills))
        return outcomes

    def _admit(self) -> None:
        while self._waiting and self._verifier.rank.kv.num_free:
            session = self._waiting.popleft()
            session.slot = self._slots[session.id] = self._verifier.rank.kv.allocate()
            self._running.append(session)
            self._prefilled[session.id] = 0
            session.phase = Phase.PREFILL if session.base > 1 else Phase.DECODE
            if self._cap(session) == 0:
                continue
            if self._local is not None:
                self._local.begin(session.id, session.tokens, session.params, session.prompt_len)
            if self._pipeline is not None:
                self._pipeline.open(session, session.request.speculation.stages or self._pipeline.stages)

    def _draft(self, decoding: Sequence[Session]) -> list[TokenTree]:
        """One tree per session, within its own limits: the remote stages' where it came in time, else a local guess."""
        found: dict[str, TokenTree] = {}
        if self._pipeline is not None and decoding:
            found = self._pipeline.collect(decoding, self._deadline(len(decoding)))
        caps = {session.id: self._cap(session) for session in decoding}
        asks = [
            Ask(session.id, caps[session.id], session.max_depth)
            for session in decoding
            if session.id not in found and caps[session.id] > 0 and self._asks_local(session)
        ]
        if self._local is not None and asks:
            start = time.perf_counter()
            found |= self._local.propose(asks, {})
            self._local_seconds += 0.2 * (time.perf_counter() - start - self._local_seconds)
        return [
            found[session.id].prune(caps[session.id], session.max_depth) if session.id in found else TokenTree.empty()
            for session in decoding
        ]

    def _asks_local(self, session: Session) -> bool:
        """Whether the local drafter may guess: it is of a stage the client named, or the engine chooses and it pays."""
        if self._local is None:
            return False
        stages = session.request.speculation.stages
        return self._mode != PLAIN if stages is None else self._local.stage.name.lower() in stages

    def _budget(self, trees: list[TokenTree]) -> list[TokenTree]:
        """Prune to what pays (governor ``auto``) and to what fits into a step beside the prompts under way."""
        if not trees:
            return []
        room = max(0, self._config.max_rows - len(trees) - self._prefill_share())
        if self._config.governor == "always":
            share = room // len(trees)
            return [tree.prune(share) for tree in trees]
        scores = [self._calibration.scores(tree) for tree in trees]
        counts = choose_nodes(scores, self._curve, room, len(trees))
        # The best nodes by calibrated score; scores never grow along a path, so parents come along. The trees keep the
        # drafters' own scores: these are what the calibration is about.
        return [
            tree.take(np.sort(np.argsort(-path, kind="stable")[:count]))
            for tree, path, count in zip(trees, scores, counts)
        ]

    def _prefill_share(self) -> int:
        """Rows that guesses must leave to prompts: otherwise sessions with large trees would hold a new one up."""
        left = sum(s.base - 1 - self._prefilled[s.id] for s in self._running if s.phase is Phase.PREFILL)
        return min(left, self._config.prefill_chunk, self._config.max_rows // 2)

    def _cap(self, session: Session) -> int:
        wish = session.request.speculation
        if not wish.enabled or session.max_depth <= 0:
            return 0
        return self._config.max_nodes if wish.max_nodes is None else min(wish.max_nodes, self._config.max_nodes)

    def _deadline(self, sessions: int) -> float:
        config = self._config
        wait = 1e3 * config.draft_deadline_steps * self._curve.at(sessions)
        return max(config.draft_deadline_min_ms, min(config.draft_deadline_max_ms, wait)) / 1e3

    def _prefill_chunks(self, rows_used: int) -> list[tuple[Session, Prefill]]:
        """Fill the rest of the step with prompt tokens, oldest session first; at least one token per step."""
        room = max(1, self._config.max_rows - rows_used)
        chunks: list[tuple[Session, Prefill]] = []
        for session in self._running:
            if session.phase is not Phase.PREFILL or room <= 0:
                continue
            at = self._prefilled[session.id]
            size = min(room, self._config.prefill_chunk, session.base - 1 - at)
            chunks.append((session, Prefill(session.slot, session.tokens[at : at + size])))
            room -= size
        return chunks

    def _advance_prefill(self, chunks: Sequence[tuple[Session, Prefill]]) -> None:
        for session, chunk in chunks:
            self._prefilled[session.id] += len(chunk.token_ids)
            if self._prefilled[session.id] == session.base - 1:
                session.phase = Phase.DECODE

    def _commit(
        self, decoding: Sequence[Session], trees: Sequence[TokenTree], blocks: Sequence[Accepted | EngineFailed]
    ) -> tuple[list[Outcome], list[tuple[Session, Commit]]]:
        """Stop rules, statistics and release of what ended; the commits of the sessions that go on."""
        outcomes: list[Outcome] = []
        commits: list[tuple[Session, Commit]] = []
        for session, tree, block in zip(decoding, trees, blocks):
            if isinstance(block, EngineFailed):
                self._release(session)
                outcomes.append(Outcome(session, error=block))
                continue
            self._calibration.observe(tree, block.nodes)
            origins = [Origin(int(tree.stages[node])) for node in block.nodes] + [Origin.TARGET]
            try:
                item, commit = session.advance(block.tokens, origins, len(tree))
            except Exception as error:  # its text: the other sessions' tokens are computed already
                log.exception("session %s cannot go on", session.id)
                self._release(session)
                outcomes.append(Outcome(session, error=EngineFailed(f"{type(error).__name__} in the session's text")))
                continue
            outcomes.append(Outcome(session, item))
            if session.finish_reason is not None:
                self._release(session)
            else:
                commits.append((session, commit))
        if decoding:
            self._calibration.forget()
        return outcomes, commits

    def _ask_drafters(self, commits: Sequence[tuple[Session, Commit]]) -> None:
        """Tell the local drafter what was committed, and ask the remote stages where the next round shall use them."""
        if self._local is not None:
            for session, commit in commits:
                self._local.commit(session.id, commit.token_ids)
        usual = self._usual_modes()
        free = {session.id for session, _ in commits if _engine_chooses(session) and self._cap(session) > 0}
        if self._config.governor == "always":
            mode = REMOTE if self._pipeline is not None else usual[0]
        elif free:
            reachable = self._pipeline is not None and self._pipeline.reachable(free)
            mode = self._modes.choose([*usual, REMOTE] if reachable else usual)
        else:
            mode = self._mode
        if self._pipeline is not None:
            default = self._pipeline.stages if mode == REMOTE else ()
            under_way = self._pipeline.ask(
                [(s, s.request.speculation.stages or default, cap) for s, _ in commits if (cap := self._cap(s)) > 0]
            )
            if mode == REMOTE and not free <= under_way:
                # Stages that are not ready yet are not measured, neither as fast nor as slow.
                mode = MIXED if free & under_way else self._fallback(usual)
        self._mode = mode

    def _usual_modes(self) -> list[str]:
        """What the engine can do by itself. Doing without a drafter that costs next to nothing is not worth a look."""
        if self._local is None:
            return [PLAIN]
        return [LOCAL] if self._local_seconds < CHEAP * self._curve.plain_step else [LOCAL, PLAIN]

    def _fallback(self, usual: Sequence[str]) -> str:
        return usual[0] if self._config.governor == "always" else self._modes.best(usual)

    def _release(self, session: Session) -> None:
        """Give back everything the session holds. The one way out of ``_running``."""
        self._running.remove(session)
        del self._prefilled[session.id], self._slots[session.id]
        self._verifier.rank.kv.free(session.slot)
        session.phase, session.slot = Phase.FINISHED, -1
        if self._local is not None:
            self._local.end(session.id)
        if self._pipeline is not None:
            self._pipeline.close(session.id)

    def _account(
        self,
        mode: str,
        start: float,
        drafted: float,
        spent: StepTimes,
        outcomes: Sequence[Outcome],
        prefilling: bool,
    ) -> None:
        total = time.perf_counter() - start
        times = self.times
        times.draft += drafted - start
        times.forward += spent.forward
        times.accept += spent.accept
        times.other += total - (drafted - start) - spent.forward - spent.accept
        times.steps += 1
        decoded = [outcome for outcome in outcomes if outcome.item is not None]
        if decoded and not prefilling and all(_engine_chooses(outcome.session) for outcome in decoded):
            tokens = sum(len(outcome.item.token_ids) for outcome in decoded if outcome.item)
            if mode != MIXED:
                self._modes.observe(mode, tokens / len(decoded), total / self._curve.at(len(decoded)))
        speeds = ", ".join(f"{name} {self._modes.speed(name):.2f}" for name in self._modes.steps)
        self.last_choice = f"{mode} drafting for {len(outcomes)} sessions (tokens per plain step: {speeds})"


def _engine_chooses(session: Session) -> bool:
    """Whether where guesses come from is left to the engine."""
    return session.request.speculation.enabled and session.request.speculation.stages is None

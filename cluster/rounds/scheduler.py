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

from cluster.core.accept import Accepted
from cluster.core.config import EngineConfig
from cluster.core.errors import EngineFailed, InvalidTree, Overloaded, PacelineError
from cluster.core.token_tree import TokenTree
from cluster.core.types import Commit, FinishReason, Origin, StreamItem
from cluster.engine.verifier import Prefill, StepTimes, Verifier, Verify
from cluster.rounds.governor import Calibration, CostCurve, ModeChooser, choose_nodes
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.session import Phase, Session
from drafters.base import Ask, Drafter

log = logging.getLogger(__name__)

LOCAL, REMOTE = "local", "remote"


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
        self._local = local
        self._pipeline = pipeline
        self._calibration = Calibration()
        self._modes = ModeChooser()
        self._mode = LOCAL
        self._waiting: deque[Session] = deque()
        self._running: list[Session] = []
        self._prefilled: dict[str, int] = {}
        self._slots = {} if slots is None else slots
        self.times = RoundTimes()
        self.last_choice = ""

    # --- sessions come and go

    def submit(self, session: Session) -> Outcome | None:
        """Queue a session. Raises ``Overloaded`` where too many wait; an outcome where it is over before it began."""
        if session.finish_reason is not None:
            return Outcome(session, session.closing_item())
        if len(self._waiting) >= self._config.max_waiting + self._verifier.rank.kv.num_free:
            raise Overloaded(f"{len(self._waiting)} requests wait already, at most {self._config.max_waiting}")
        if session.request.epoch > 0:
            self._waiting.appendleft(session)  # a replay was admitted before: it does not queue twice
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
        trees = self._draft(decoding)
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
            if self._local is not None and _speculates(session):
                self._local.begin(session.id, session.tokens, session.params, session.prompt_len)
            if self._pipeline is not None and _speculates(session):
                self._pipeline.open(session, session.request.speculation.stages or self._pipeline.stages)

    def _draft(self, decoding: Sequence[Session]) -> list[TokenTree]:
        """One tree per session: the remote stages' where it came in time, else a local guess, sized by the governor."""
        if not decoding:
            return []
        found: dict[str, TokenTree] = {}
        if self._pipeline is not None:
            found = self._pipeline.collect(decoding, self._deadline(len(decoding)))
        caps = {session.id: self._cap(session) for session in decoding}
        asks = [
            Ask(session.id, cap, session.max_depth)
            for session in decoding
            if session.id not in found
            and (cap := caps[session.id]) > 0
            and session.request.speculation.stages in (None, ("small",))
        ]
        if self._local is not None and asks:
            found |= self._checked(self._local.propose(asks, {}))
        trees = [
            found[session.id].prune(caps[session.id], session.max_depth) if session.id in found else TokenTree.empty()
            for session in decoding
        ]
        return self._budget(trees)

    def _checked(self, trees: dict[str, TokenTree]) -> dict[str, TokenTree]:
        """A drafter's trees without those that break the invariants: a broken drafter costs time, not correctness."""
        sound = {}
        for session_id, tree in trees.items():
            try:
                tree.check(self._verifier.rank.config.vocab_size)
            except InvalidTree as error:
                log.warning("the local drafter's tree for %s is refused: %s", session_id, error)
            else:
                sound[session_id] = tree
        return sound

    def _budget(self, trees: list[TokenTree]) -> list[TokenTree]:
        """Prune to what pays (governor ``auto``) and to what fits into a step."""
        room = max(0, self._config.max_rows - len(trees))
        if self._config.governor == "always":
            share = room // len(trees)
            return [tree.prune(share) for tree in trees]
        scores = [self._calibration.scores(tree) for tree in trees]
        counts = choose_nodes(scores, self._curve, room, len(trees))
        return [
            TokenTree(tree.tokens, tree.parents, path.astype("float32"), tree.stages, tree.key).prune(count)
            for tree, path, count in zip(trees, scores, counts)
        ]

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
            item, commit = session.advance(block.tokens, origins, len(tree))
            outcomes.append(Outcome(session, item))
            if session.finish_reason is not None:
                self._release(session)
            elif _speculates(session):
                commits.append((session, commit))
        return outcomes, commits

    def _ask_drafters(self, commits: Sequence[tuple[Session, Commit]]) -> None:
        if self._local is not None:
            for session, commit in commits:
                self._local.commit(session.id, commit.token_ids)
        if self._pipeline is None:
            return
        modes = [LOCAL, REMOTE] if self._local is not None else [REMOTE]
        self._mode = REMOTE if self._config.governor == "always" else self._modes.choose(modes)
        default = self._pipeline.stages if self._mode == REMOTE else ()
        wishes = [
            (session, session.request.speculation.stages or default, self._cap(session)) for session, _ in commits
        ]
        self._pipeline.ask([wish for wish in wishes if wish[1] and wish[2] > 0])

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
        chosen_freely = all(outcome.session.request.speculation.stages is None for outcome in outcomes)
        if outcomes and chosen_freely and not prefilling:
            tokens = sum(len(outcome.item.token_ids) for outcome in outcomes if outcome.item)
            self._modes.observe(mode, tokens, total)
        rates = ", ".join(f"{name} {self._modes.rate(name):.0f} tokens/s" for name in self._modes.seconds)
        self.last_choice = f"{mode} drafting for {len(outcomes)} sessions ({rates})"


def _speculates(session: Session) -> bool:
    return session.request.speculation.enabled

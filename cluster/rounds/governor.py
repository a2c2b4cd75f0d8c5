"""How much to guess: choices from measured facts. A wrong choice here costs time, never correctness.

At every possible size N the value of a step is (sessions + expected accepted nodes) per second of the step; guessing
nothing competes as an equal, and nothing is guessed where nothing pays.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.core.config import EngineConfig
from cluster.core.stats import GovernorReport
from cluster.core.token_tree import TokenTree
from cluster.engine.step_cost import STALE_FACTOR, CostCurve
from cluster.rounds.buckets import Buckets
from cluster.rounds.calibration import Calibration, Offer
from cluster.rounds.cost import LiveCost
from cluster.rounds.gate import AskGate
from cluster.rounds.modes import MIXED, ModeChooser

MARGIN = 1.01  # guessing must promise so much more than guessing nothing
DRIFT_CHECK = 100  # steps of one width between two looks at how far the cost curve has drifted
NODES_RATE = 0.05  # weight of the newest step in how many nodes a session's tree keeps
LEAST_SHARE = 0.5  # of the score at which a node would pay, if the score were its chance
RECENT = 0.98  # of the expected and measured speeds reported is left after a round
NODES = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0)


class Choice(enum.StrEnum):
    """Why a step has so many nodes."""

    NOTHING_OFFERED = "nothing_offered"  # no drafter has a guess, or none was asked
    NOTHING_PAYS = "nothing_pays"
    BEST_PAY = "best_pay"  # more of them would cost more than they bring
    ALL_PAY = "all_pay"
    NO_ROOM = "no_room"  # all that fits into a step beside prompts and roots
    ALWAYS = "always"  # by configuration, whether they pay or not


def choose_nodes(scores: Sequence[Sequence[float]], seconds: Sequence[float], plain: float | None = None) -> list[int]:
    """How many of each session's best nodes to verify: one heap over all sessions.

    scores: per session, path probabilities in any order. seconds: of the step with 0, 1, 2, ... nodes; its length
    bounds them. plain: seconds of the step without nodes and without prompts, where it reads some: their rows are worth
    what they cost, so that a node must pay as if they were not there.
    """
    counts = [0] * len(scores)
    ranked = sorted((-score, session) for session, part in enumerate(scores) for score in part)
    if not ranked or len(seconds) < 2:
        return counts
    value = len(scores) * seconds[0] / (plain or seconds[0])
    most, best = MARGIN * value / seconds[0], 0
    for number, ((score, _), after) in enumerate(zip(ranked, seconds[1:]), 1):
        value -= score
        if value / after > most:
            most, best = value / after, number
    for _, session in ranked[:best]:
        counts[session] += 1
    return counts


def best_nodes(tree: TokenTree, path: Sequence[float], count: int) -> tuple[TokenTree, float]:
    """The ``count`` nodes of highest path probability, and how many of them should be accepted.

    Probabilities never grow along a path, so parents come along. The tree keeps the drafter's own scores: these are
    what the calibration is about.
    """
    if count == len(tree):
        return tree, sum(path)
    if count == 0:
        return TokenTree.empty(), 0.0
    nodes = sorted(sorted(range(len(path)), key=path.__getitem__, reverse=True)[:count])
    return tree.take(np.array(nodes)), sum(path[node] for node in nodes)


@dataclass(frozen=True, slots=True)
class Shape:
    """A step's rows: one root of each decoding session, nodes, prompt tokens. ``context``: mean length behind them.
    ``sitting_out``: sessions that decode as well, but whose turn comes with the next step."""

    sessions: int
    nodes: int
    prompt_rows: int
    context: float
    sitting_out: int = 0

    @property
    def rows(self) -> int:
        return self.sessions + self.nodes + self.prompt_rows


@dataclass(frozen=True, slots=True)
class RoundSpent:
    """Seconds of one round: drafting, the forward pass, the walks with their KV commits, and altogether."""

    draft: float
    forward: float
    accept: float
    total: float


class Governor:
    """What is known of costs and acceptance, and the choices made from it. ``calibration`` is of all drafters."""

    def __init__(self, config: EngineConfig, curve: CostCurve) -> None:
        self.cost = LiveCost(curve)
        self.calibration = Calibration()
        self.modes = ModeChooser()
        self.gate = AskGate()
        self.rows: Counter[int] = Counter()
        self.choices: Counter[Choice] = Counter()
        self.nodes = Buckets(NODES)
        self.on_drift: Callable[[], None] | None = None  # called once where the curve measured at start is far off
        self._config = config
        self._offers: list[Offer] = []  # what the round under way was offered ...
        self._expected = 0.0  # ... and how many tokens it should yield
        self._tree_nodes = 0.0  # that a session's tree kept of late
        self._recent = [0.0] * 4  # expected tokens and seconds, measured tokens and seconds

    @property
    def always(self) -> bool:
        return self._config.governor == "always"

    def budget(
        self, session_ids: Sequence[str], trees: Sequence[TokenTree], prompt_rows: int, context: float
    ) -> list[TokenTree]:
        """The sessions' trees pruned to what pays, and to what fits into a step beside the prompts under way."""
        self._expected, self._offers = float(len(trees)), []
        if not trees:
            return []
        room = max(0, self._config.max_rows - len(trees) - prompt_rows)
        if not any(map(len, trees)):
            self.choices[Choice.NOTHING_OFFERED] += 1
            return list(trees)
        self._offers = list(map(Offer.of, session_ids, trees))
        if self.always:
            self.choices[Choice.ALWAYS] += 1
            return [tree.prune(room // len(trees)) for tree in trees]
        scores = self.calibration.scores(self._offers)
        offered = sum(map(len, trees))
        most = min(room, offered)
        seconds = self.cost.rounds(len(trees) + prompt_rows, most + 1, context, len(trees))
        counts = choose_nodes(scores, seconds, self.plain_seconds(len(trees), context))
        self.choices[_why(sum(counts), offered, room)] += 1
        pruned = [best_nodes(tree, path, count) for tree, path, count in zip(trees, scores, counts)]
        self._expected += sum(expected for _, expected in pruned)
        return [tree for tree, _ in pruned]

    def learn(self, emitted: Sequence[Sequence[int] | None]) -> None:
        """What the target emitted in each session of the last ``budget``; None where it failed."""
        if self._offers:
            self.calibration.observe(self._offers, emitted)

    def plain_seconds(self, sessions: int, context: float) -> float:
        """What a step costs in which so many sessions decode, without guesses."""
        return self.cost.at(sessions, context, sessions) + self.cost.overhead

    def token_seconds(self, sessions: int, context: float) -> float:
        """What one token costs without guessing, while so many sessions decode."""
        return self.plain_seconds(sessions, context) / max(1, sessions)

    def least_score(self, sessions: int, context: float) -> float:
        """What a drafter must score a node for it to be worth a look, while so many sessions decode: less than what
        nodes beyond the usual ones would have to, since scores are calibrated only then."""
        if self.always or not sessions:
            return 0.0
        most = self._config.max_rows
        usual = min(round(sessions * (1.0 + self._tree_nodes)), most - 1)
        wider = min(usual + max(2, sessions), most)
        added = self.cost.at(wider, context, sessions) - self.cost.at(usual, context, sessions)
        return LEAST_SHARE * added / (wider - usual) / self.token_seconds(sessions, context)

    def price_of_nodes(self, shape: Shape) -> float:
        """Tokens that plain decoding would have yielded in the time that each node added to the step."""
        if not shape.nodes:
            return 0.0
        rows, context, sessions = shape.rows, shape.context, shape.sessions
        added = self.cost.at(rows, context, sessions) - self.cost.at(rows - shape.nodes, context, sessions)
        return added / shape.nodes / self.token_seconds(sessions, context)

    def observe(self, mode: str, shape: Shape, tokens: int, spent: RoundSpent) -> None:
        """A round is over. ``mode``: where its guesses came from, as far as all sessions left that to the engine."""
        context = shape.context
        if shape.sessions:
            self.rows[shape.sessions + shape.nodes] += 1
            self.nodes.observe(shape.nodes)
            self._tree_nodes += NODES_RATE * (shape.nodes / shape.sessions - self._tree_nodes)
        if shape.sessions and not shape.prompt_rows:
            expected_s = self.cost.at(shape.rows, context, shape.sessions) + self.cost.overhead + spent.draft
            news = (self._expected, expected_s, tokens, spent.total)
            self._recent = [RECENT * old + new for old, new in zip(self._recent, news)]
            if mode != MIXED:
                # By the curve as it was measured: corrections follow what the mode in use does, and would favour it.
                sessions = shape.sessions + shape.sitting_out
                plain_s = self.cost.curve.at(sessions, context, sessions) + self.cost.overhead
                self.modes.observe(mode, tokens / sessions, spent.total / plain_s)
        if not shape.prompt_rows:  # prompts' rows want no logits: a step with them is none of the curve's
            other = spent.total - spent.forward - spent.draft
            self.cost.observe(shape.rows, context, spent.forward, other, shape.sessions)
            if (
                self.on_drift is not None
                and self.rows[shape.rows] % DRIFT_CHECK == 0
                and self.cost.drift > STALE_FACTOR
            ):
                report, self.on_drift = self.on_drift, None
                report()
        self.gate.tick(spent.total)

    def forget(self, session_id: str) -> None:
        self.gate.forget(session_id)
        self.calibration.forget(session_id)

    def report(self, mode: str) -> GovernorReport:
        return GovernorReport(
            mode=mode,
            speeds={name: self.modes.speed(name) for name in list(self.modes.steps)},
            rows=dict(self.rows),
            expected_tokens_per_s=self.expected_tokens_per_s,
            measured_tokens_per_s=self.measured_tokens_per_s,
            drift=self.cost.drift,
            nodes=self.nodes.snapshot(),
            choices={str(choice): count for choice, count in self.choices.copy().items()},
        )

    @property
    def expected_tokens_per_s(self) -> float:
        return self._recent[0] / self._recent[1] if self._recent[1] else 0.0

    @property
    def measured_tokens_per_s(self) -> float:
        return self._recent[2] / self._recent[3] if self._recent[3] else 0.0


def _why(chosen: int, offered: int, room: int) -> Choice:
    if not chosen:
        return Choice.NOTHING_PAYS if room else Choice.NO_ROOM
    if chosen == offered:
        return Choice.ALL_PAY
    return Choice.NO_ROOM if chosen == room else Choice.BEST_PAY

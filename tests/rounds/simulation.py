"""A simulated engine around the real governor: guesses hold with known chances, the clock is simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.core.config import EngineConfig
from cluster.core.token_tree import TokenTree
from cluster.engine.step_cost import CostCurve
from cluster.rounds.calibration import emitted_path
from cluster.rounds.governor import Governor, RoundSpent, Shape
from cluster.rounds.modes import LOCAL, PLAIN

CPU = CostCurve((1, 2, 4, 8, 16, 32, 64), (4.0e-3, 4.1e-3, 4.3e-3, 5.9e-3, 10.9e-3, 21.5e-3, 42.0e-3))
GPU = CostCurve((1, 64, 128, 256), (10e-3, 10.5e-3, 11e-3, 20e-3))
OVERHEAD_S = 0.4e-3
STRANGER = 10_000  # a token in no tree


@dataclass(slots=True)
class Text:
    """One session's drafter. At each level, the first of ``width`` children claims and holds with these chances.

    Where ``quiet`` is set nothing holds in every other stretch of so many rounds, as in a text that repeats itself only
    at times. Node i carries token i.
    """

    claimed: Sequence[float]
    holds: Sequence[float]
    width: int = 2
    quiet: int = 0
    rounds: int = 0

    def tree(self, nodes: int) -> tuple[TokenTree, np.ndarray]:
        """A tree of at most ``nodes`` nodes, ``width`` children a level, and each node's chance given its parent."""
        parents: list[int] = []
        scores: list[float] = []
        chances: list[float] = []
        parent, path = -1, 1.0
        self.rounds += 1
        silent = self.quiet > 0 and (self.rounds // self.quiet) % 2 == 1
        for claimed, holds in zip(self.claimed, self.holds):
            first = len(parents)
            for child in range(self.width):
                if len(parents) < nodes:
                    parents.append(parent)
                    scores.append(path * claimed * 0.3**child)
                    chances.append(0.0 if silent else holds * 0.3**child)
            if first >= len(scores):
                break
            parent, path = first, scores[first]
        return TokenTree.build(range(len(parents)), parents, scores, 1), np.array(chances)


@dataclass(slots=True)
class Machine:
    """Simulated costs: ``draft_s`` for each session asked; a step's seconds vary by ``noise`` (of their log)."""

    curve: CostCurve
    draft_s: float = 0.2e-3
    noise: float = 0.05
    seed: int = 0
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def step_s(self, rows: int) -> float:
        return self.curve.at(rows) * float(np.exp(self.noise * self.rng.standard_normal()))


def accept(tree: TokenTree, chances: np.ndarray, rng: np.random.Generator) -> list[int]:
    """The walk: at each node at most one child holds."""
    path: list[int] = []
    at = -1
    while True:
        children = np.flatnonzero(tree.parents == at)
        draw = float(rng.random())
        for child in children.tolist():
            draw -= chances[child]
            if draw < 0.0:
                at = child
                path.append(child)
                break
        else:
            return path


def governed(
    machine: Machine, texts: Sequence[Text], rounds: int, curve: CostCurve | None = None, max_nodes: int = 24
) -> tuple[float, Governor]:
    """Tokens per second under the governor, which believes ``curve`` (by default the machine's own)."""
    governor = Governor(EngineConfig(max_rows=64, kv_slots=16), curve or machine.curve)
    names = [str(at) for at in range(len(texts))]
    clock = tokens = 0.0
    for _ in range(rounds):
        mode = governor.modes.choose([LOCAL, PLAIN])
        asked = governor.gate.choose(names, governor.token_seconds(len(texts), 0.0)) if mode == LOCAL else set()
        draft_s = machine.draft_s * len(asked)
        if asked:
            governor.gate.asked(len(asked), draft_s)
        offers = [
            text.tree(max_nodes) if name in asked else (TokenTree.empty(), np.empty(0))
            for name, text in zip(names, texts)
        ]
        trees = governor.budget(names, [tree for tree, _ in offers], 0, 0.0)
        shape = Shape(len(texts), sum(map(len, trees)), 0, 0.0)
        price = governor.price_of_nodes(shape)
        won = 0
        emitted = []
        for name, tree, (offer, chances) in zip(names, trees, offers):
            truth = [*offer.tokens[accept(offer, chances, machine.rng)], STRANGER]
            path = emitted_path(tree, truth)
            emitted.append(truth[: len(path) + 1])
            if name in asked:
                governor.gate.observe(name, len(path) - price * len(tree))
            won += 1 + len(path)
        governor.learn(emitted)
        forward = machine.step_s(shape.rows)
        total = forward + OVERHEAD_S + draft_s
        governor.observe(mode, shape, won, RoundSpent(draft_s, forward, 0.0, total))
        clock += total
        tokens += won
    return tokens / clock, governor


def fixed(machine: Machine, texts: Sequence[Text], rounds: int, nodes: int) -> float:
    """Tokens per second where each session always has its ``nodes`` best-scored nodes verified; 0: plain decoding."""
    clock = tokens = 0.0
    for _ in range(rounds):
        rows = 0
        for text in texts:
            offer, chances = text.tree(24)
            truth = [*offer.tokens[accept(offer, chances, machine.rng)], STRANGER]
            tree = offer.prune(nodes)
            tokens += 1 + len(emitted_path(tree, truth))
            rows += 1 + len(tree)
        clock += machine.step_s(rows) + OVERHEAD_S + (machine.draft_s * len(texts) if nodes else 0.0)
    return tokens / clock

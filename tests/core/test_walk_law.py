"""Proof by enumeration that the walk emits the target's law, whatever tree it is given. Exact fractions, no sampling.

The target over the vocabulary {0, 1, 2} gives every next token a probability in quarters that depends on the tokens so
far. One *outcome* fixes a draw from {0, 1, 2, 3} for each position; all outcomes are equally likely, and the draw picks
the target's token at that position, given what stands before it. That is the shape of the real rule, where the noise of
a position picks the token, with an ensemble small enough to go through whole. Rows are one-hot at the picked token, so
the code that runs is the real ``accept``, at temperature 0.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
from plain import plain_token

from cluster.core.accept import accept
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from cluster.core.warp import History

Tokens = tuple[int, ...]
Law = dict[Tokens, Fraction]
Outcome = tuple[int, ...]
Walk = Callable[[Outcome, Tokens, TokenTree], Tokens]

VOCAB, DRAWS, LENGTH = 3, 4, 3
GREEDY = SamplingParams(temperature=0.0)
QUARTERS = [(2, 1, 1), (1, 3, 0), (0, 2, 2), (1, 1, 2), (4, 0, 0)]


def quarters(prefix: Tokens) -> Tokens:
    """The target's next-token law after ``prefix``, in quarters."""
    return QUARTERS[
        (sum((place + 1) * (token + 1) for place, token in enumerate(prefix)) + len(prefix)) % len(QUARTERS)
    ]


def picked(prefix: Tokens, outcome: Outcome) -> int:
    """The target's token after ``prefix`` under ``outcome``; token 0 past the outcome's end."""
    if len(prefix) >= len(outcome):
        return 0
    bounds = itertools.accumulate(quarters(prefix))
    return next(token for token, bound in enumerate(bounds) if outcome[len(prefix)] < bound)


def outcomes(length: int = LENGTH) -> Iterator[Outcome]:
    return itertools.product(range(DRAWS), repeat=length)


def target_law(length: int) -> Law:
    law: Law = {(): Fraction(1)}
    for _ in range(length):
        law = {
            (*prefix, token): p * Fraction(share, 4)
            for prefix, p in law.items()
            for token, share in enumerate(quarters(prefix))
            if share
        }
    return law


def real_round(outcome: Outcome, prefix: Tokens, tree: TokenTree) -> Tokens:
    """One round of the code under test: the tokens it emits after ``prefix``."""
    rows = np.zeros((len(tree) + 1, VOCAB), np.float32)
    for node in range(-1, len(tree)):
        path = tuple(int(tree.tokens[i]) for i in tree.path(node))
        rows[node + 1, picked(prefix + path, outcome)] = 1.0
    return accept(rows, tree, GREEDY, History([], prefix, GREEDY), len(prefix), frozenset()).tokens


def generate(outcome: Outcome, drafter: Callable[[Tokens, Outcome], TokenTree], one_round: Walk = real_round) -> Tokens:
    """Round after round until ``LENGTH`` tokens stand, what is beyond them dropped."""
    tokens: Tokens = ()
    while len(tokens) < LENGTH:
        tokens += one_round(outcome, tokens, drafter(tokens, outcome))
    return tokens[:LENGTH]


def law_of(drafter: Callable[[Tokens, Outcome], TokenTree], one_round: Walk = real_round) -> Law:
    law: Law = defaultdict(Fraction)
    for outcome in outcomes():
        law[generate(outcome, drafter, one_round)] += Fraction(1, DRAWS**LENGTH)
    return dict(law)


def small_trees(nodes: int) -> list[TokenTree]:
    """Every tree of ``nodes`` nodes over the vocabulary, duplicate siblings included."""
    return [
        TokenTree.build(tokens, parents)
        for parents in itertools.product(*(range(-1, node) for node in range(nodes)))
        for tokens in itertools.product(range(VOCAB), repeat=nodes)
    ]


def reachable_paths(tree: TokenTree) -> set[Tokens]:
    """The token paths a walk can stand at: below duplicate siblings, only the first one's."""
    path_of: dict[int, Tokens] = {-1: ()}
    for node, (token, parent) in enumerate(zip(tree.tokens.tolist(), tree.parents.tolist())):
        if parent in path_of and (*path_of[parent], token) not in path_of.values():
            path_of[node] = (*path_of[parent], token)
    return set(path_of.values())


def future(prefix: Tokens, outcome: Outcome, length: int) -> Tokens:
    tokens = prefix
    for _ in range(length):
        tokens += (picked(tokens, outcome),)
    return tokens[len(prefix) :]


# Drafters that know the noise, hence the target's every token, and try to bend the output with it.
KNOWING_DRAFTERS: dict[str, Callable[[Tokens, Outcome], TokenTree]] = {
    "always right": lambda prefix, outcome: TokenTree.chain(future(prefix, outcome, 3)),
    "always wrong": lambda prefix, outcome: TokenTree.chain([(t + 1) % 3 for t in future(prefix, outcome, 3)]),
    "right only for token 0": lambda prefix, outcome: TokenTree.chain(
        [0] if picked(prefix, outcome) == 0 else [0, 0, 0]
    ),
    "offers all but the target's": lambda prefix, outcome: TokenTree.build(
        [t for t in range(3) if t != picked(prefix, outcome)], [-1, -1]
    ),
    "right, then wrong": lambda prefix, outcome: TokenTree.chain(
        [picked(prefix, outcome), *((t + 2) % 3 for t in future(prefix, outcome, 3)[1:])]
    ),
    "the right path behind a duplicate": lambda prefix, outcome: TokenTree.build(
        [picked(prefix, outcome), *future(prefix, outcome, 2)], [-1, -1, 1]
    ),
    "silent on even draws": lambda prefix, outcome: (
        TokenTree.empty() if outcome[len(prefix)] % 2 == 0 else TokenTree.chain(future(prefix, outcome, 2))
    ),
}


def test_the_ensemble_has_the_targets_law() -> None:
    assert law_of(lambda prefix, outcome: TokenTree.empty()) == target_law(LENGTH)
    assert len(target_law(LENGTH)) > 10


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_every_small_tree_leaves_the_law_and_every_outcome_as_they_are(nodes: int) -> None:
    expected = target_law(LENGTH)
    trees = small_trees(nodes)
    for tree in trees if nodes < 3 else trees[::5]:
        law: Law = defaultdict(Fraction)
        for outcome in outcomes():
            tokens = generate(outcome, lambda prefix, known, tree=tree: tree)  # type: ignore[misc]
            assert tokens == future((), outcome, LENGTH)
            law[tokens] += Fraction(1, DRAWS**LENGTH)
        assert law == expected


@pytest.mark.parametrize("nodes", [0, 1, 2, 3])
def test_one_rounds_block_has_the_law_the_tree_implies(nodes: int) -> None:
    """A block is a path of the tree and a token that leaves it: its probability is the target's for those tokens."""
    for tree in small_trees(nodes)[:: max(1, nodes * 2 - 3)]:
        law: Law = defaultdict(Fraction)
        for outcome in outcomes(nodes + 1):
            law[real_round(outcome, (), tree)] += Fraction(1, DRAWS ** (nodes + 1))
        paths = reachable_paths(tree)
        expected = {
            block: p
            for length in range(1, nodes + 2)
            for block, p in target_law(length).items()
            if block[:-1] in paths and block not in paths
        }
        assert law == expected


@pytest.mark.parametrize("drafter", KNOWING_DRAFTERS.values(), ids=KNOWING_DRAFTERS)
def test_drafters_that_know_the_noise_cannot_bend_the_law(drafter: Callable[[Tokens, Outcome], TokenTree]) -> None:
    assert law_of(drafter) == target_law(LENGTH)


def test_a_full_deep_tree_leaves_the_law_as_it_is() -> None:
    """All 39 paths of up to three tokens at once: every token but the last is then accepted, never guessed wrong."""
    tokens, parents = list(range(3)), [-1] * 3
    for level in (range(0, 3), range(3, 12)):
        for parent in level:
            tokens += [0, 1, 2]
            parents += [parent] * 3
    tree = TokenTree.build(tokens, parents)
    assert law_of(lambda prefix, outcome: tree) == target_law(LENGTH)
    assert all(len(real_round(outcome, (), tree)) == 4 for outcome in outcomes(4))


def test_the_enumeration_notices_a_walk_that_favours_the_tree() -> None:
    """A negative control: emit the first child where the target's token is not among the children."""

    def favouring(outcome: Outcome, prefix: Tokens, tree: TokenTree) -> Tokens:
        block = real_round(outcome, prefix, tree)
        return (int(tree.tokens[0]),) if len(block) == 1 and len(tree) else block

    assert law_of(lambda prefix, outcome: TokenTree.chain([1]), favouring) != target_law(LENGTH)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=11),
        SamplingParams(seed=12, temperature=0.7, top_p=0.9),
        SamplingParams(seed=13, top_k=3, repetition_penalty=1.4),
        SamplingParams(seed=14, min_p=0.1, frequency_penalty=0.5, min_tokens=4),
    ],
    ids=str,
)
def test_with_the_real_noise_any_trees_give_the_tokens_of_plain_decoding(params: SamplingParams) -> None:
    """A random order-1 target over 6 tokens, 30 token sequences: random trees of up to 12 nodes against one by one."""
    rng = np.random.default_rng(params.seed)
    rows_after = rng.normal(0, 1.5, (6, 6)).astype(np.float32)
    prompt, stops = [2, 4], frozenset({0})
    plain: list[int] = []
    while len(plain) < 30:
        last = [*prompt, *plain][-1]
        plain.append(plain_token(rows_after[last], params, prompt, plain, len(prompt) + len(plain), set(stops))[0])
    accepted_nodes = 0
    for _ in range(10):
        output: list[int] = []
        history = History(prompt, [], params)
        while len(output) < 30:
            n = int(rng.integers(0, 13))
            tree = TokenTree.build(rng.integers(0, 6, n), [int(rng.integers(-1, node)) for node in range(n)])
            last = [*prompt, *output][-1]
            rows = rows_after[[last, *tree.tokens.tolist()]]
            accepted = accept(rows, tree, params, history, len(prompt) + len(output), stops)
            accepted_nodes += len(accepted.nodes)
            output += accepted.tokens
            history.extend(accepted.tokens)
        assert output[:30] == plain
    assert accepted_nodes > 50

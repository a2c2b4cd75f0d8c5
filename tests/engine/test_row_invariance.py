"""The contract behind exactness: a row's logits are bit-equal whatever else is in the step (docs/exactness.md)."""

from __future__ import annotations

import pytest
import torch
from engine_steps import TREE_PARENTS, chain, path_to, prefill, random_tokens, rows

from cluster.engine.rank import is_row_invariant

SHAPES = {
    "head_dim 12": ("llama", {}),
    "head_dim 16, qwen2": ("qwen2", {"hidden_size": 96}),
    "head_dim 64": ("llama", {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "head_dim 80, qwen3": ("qwen3", {"head_dim": 80, "hidden_size": 75, "num_attention_heads": 3,
                                     "num_key_value_heads": 3}),
}  # fmt: skip
KINDS = [
    ("bfloat16", "native"),
    ("float32", "native"),
    ("bfloat16", "torch"),
    ("float32", "torch"),
    ("float64", "torch"),
]
VOCAB = 101


@pytest.fixture(params=KINDS, ids=["-".join(kind) for kind in KINDS])
def kind(request):
    return request.param


@pytest.fixture(params=SHAPES)
def rank(request, kind, make_model, make_rank):
    family, changes = SHAPES[request.param]
    return make_rank(make_model(family, **changes)[1], *kind)


PROMPT = random_tokens(83, VOCAB, seed=1)
GUESSES = random_tokens(7, VOCAB, seed=2)


def test_a_row_alone_equals_the_row_among_others(rank):
    slot = prefill(rank, PROMPT)
    alone = rank.forward([rows(slot, [7], [-1])])
    other, third = prefill(rank, PROMPT[:31]), prefill(rank, PROMPT[5:50])
    for count in (1, 2, 3, 4, 5, 7, 8, 15, 31, 63):
        company = random_tokens(count, VOCAB, seed=count)
        star = rows(other, company, [-1] * count)
        assert torch.equal(rank.forward([rows(slot, [7], [-1]), star])[:1], alone)
        assert torch.equal(rank.forward([star, chain(third, company), rows(slot, [7], [-1])])[-1:], alone)
        assert torch.equal(rank.forward([rows(slot, [7, *company], [-1] * (count + 1))])[:1], alone)


def test_slots_and_prefill_chunks_do_not_show(rank):
    slot = prefill(rank, PROMPT)
    expected = rank.forward([rows(slot, GUESSES, TREE_PARENTS)])
    for chunk in (1, 7, 16, 64):
        other = prefill(rank, PROMPT, chunk)
        assert other != slot
        assert torch.equal(rank.forward([rows(other, GUESSES, TREE_PARENTS)]), expected)
        assert torch.equal(rank.kv.keys[-1][other, : len(PROMPT)], rank.kv.keys[-1][slot, : len(PROMPT)])
        rank.kv.free(other)


def test_ancestors_in_the_scratch_equal_ancestors_in_the_prefix(rank):
    slot = prefill(rank, PROMPT)
    tree = rank.forward([rows(slot, GUESSES, TREE_PARENTS)])
    for row in range(7):
        path = path_to(row)
        other = prefill(rank, PROMPT + [GUESSES[node] for node in path[:-1]], chunk=40)
        assert torch.equal(rank.forward([rows(other, [GUESSES[row]], [-1])])[0], tree[row])
        rank.kv.free(other)


def test_a_tree_grown_over_passes_equals_the_tree_in_one_pass(rank):
    slot = prefill(rank, PROMPT)
    whole = rank.forward([rows(slot, GUESSES, TREE_PARENTS)])
    grown = [
        rank.forward([rows(slot, GUESSES[first:last], TREE_PARENTS[first:last], start=first)])
        for first, last in ((0, 1), (1, 3), (3, 6), (6, 7))
    ]
    assert torch.equal(torch.cat(grown), whole)


def test_logits_after_committing_a_scattered_path_equal_those_after_a_fresh_prefill(rank):
    slot = prefill(rank, PROMPT)
    rank.forward([rows(slot, GUESSES, TREE_PARENTS)])
    path = path_to(6)
    rank.kv.commit(slot, path)
    fresh = prefill(rank, PROMPT + [GUESSES[node] for node in path])
    assert rank.kv.length(slot) == rank.kv.length(fresh) == len(PROMPT) + 4
    after, expected = (rank.forward([rows(which, [5, 6], [-1, 0])]) for which in (slot, fresh))
    assert torch.equal(after, expected)


def test_logits_after_a_rollback_equal_those_of_the_shorter_prompt(rank):
    slot, short = prefill(rank, PROMPT), prefill(rank, PROMPT[:50])
    rank.kv.truncate(slot, 50)
    assert torch.equal(*(rank.forward([chain(which, GUESSES)]) for which in (slot, short)))


def test_the_self_check_agrees(rank):
    assert rank.row_invariant


def test_the_self_check_notices_kernels_that_depend_on_the_row_count(make_model, make_rank):
    rank = make_rank(make_model("llama")[1], "float32", "torch")
    honest = rank.decoder.kernels.linear

    def careless(x, packed, residual=None):
        return honest(x, packed, residual) * (1.0 + 1e-6 * (len(x) > 1))

    rank.decoder.kernels.linear = careless
    assert not is_row_invariant(rank)

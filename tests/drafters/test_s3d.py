"""S3D: a pass through masks and kept layers, on the target's own weights and cache."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from s3d_rig import SHAPE, WHOLE, adapter, drafter_on, holding, view_of
from tiny_models import GREEDY, SAMPLED, VOCAB, chain, continuation, random_tokens, tiny_config, tiny_rank, tiny_weights

from cluster.core.errors import ConfigError, UnknownSession
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin, SamplingParams
from cluster.engine.decoder import Decoder
from cluster.engine.kernels import choose_kernels
from cluster.engine.kernels_torch import TorchKernels
from cluster.engine.kv_cache import KVCache
from cluster.engine.rank import Rank
from drafters import Ask
from drafters.expand import Float64Array, Int64Array
from drafters.growth import Growth
from drafters.options import GrowthOptions, S3DOptions
from drafters.s3d import S3DDrafter, fill
from drafters.s3d_adapter import S3DShape

INNER = tiny_config().intermediate_size


def rank_in(kernels: str, dtype: str) -> Rank:
    config = tiny_config()
    chosen = choose_kernels(kernels, dtype, 1)
    weights = {name: value.to(chosen.dtype) for name, value in tiny_weights(config, 0).items()}
    return Rank(Decoder(config, weights, chosen, 96), KVCache(config, 2, 64, 32, chosen.dtype, chosen.device))


# ---- the tree


def product_tree(tokens: Int64Array, probs: Float64Array, max_nodes: int, stage: Origin) -> TokenTree:
    growth = Growth(max_nodes, len(tokens), TokenTree.empty(), GrowthOptions(), stage)
    fill(growth, [], tokens, probs)
    return growth.tree()


def test_a_product_tree_holds_the_likeliest_paths_of_independent_positions() -> None:
    rng = np.random.default_rng(0)
    probs = -np.sort(-rng.dirichlet(np.ones(4), 3), axis=1)
    tokens = np.array([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]])
    paths = [path for depth in (1, 2, 3) for path in itertools.product(range(4), repeat=depth)]
    likelihood = {path: float(np.prod([probs[d, place] for d, place in enumerate(path)])) for path in paths}
    for max_nodes in (1, 5, 17, 84, 200):
        tree = product_tree(tokens, probs, max_nodes, Origin.MEDIUM)
        tree.check(VOCAB, max_nodes, 3)
        chosen = [tuple(int(tree.tokens[node]) % 10 for node in tree.path(leaf)) for leaf in range(len(tree))]
        best = sorted(paths, key=lambda path: -likelihood[path])[:max_nodes]
        assert sorted(chosen) == sorted(best)
        assert tree.scores == pytest.approx([likelihood[path] for path in chosen], rel=1e-6)


def test_what_the_session_rules_out_is_not_in_the_tree() -> None:
    tree = product_tree(np.array([[1, 2], [3, 4]]), np.array([[1.0, 0.0], [0.7, 0.3]]), 9, Origin.SMALL)
    assert (tree.tokens.tolist(), tree.parents.tolist()) == ([1, 3, 4], [-1, 0, 0])


# ---- the view


def test_the_view_holds_the_targets_own_weights_and_little_more() -> None:
    rank = tiny_rank()
    view = view_of(rank, adapter())
    whole, seen = rank.decoder.model, view.model
    assert whole is not None
    assert seen.embedding is whole.embedding
    assert seen.head.weight is whole.head.weight
    for ours, theirs in zip(seen.layers, whole.layers):
        for part in ("qkv", "out", "gate_up", "down"):
            assert getattr(ours, part).weight is getattr(theirs, part).weight
            assert getattr(theirs, part).adapter is None
    assert [layer.qkv.adapter is not None for layer in seen.layers] == [True, False, True, True]
    unpadded = sum(8 * tensor.numel() for tensor in adapter().tensors.values())
    assert view.num_bytes >= unpadded


def test_a_view_computes_what_a_model_with_the_adapters_folded_in_would() -> None:
    config, made, text = tiny_config(), adapter(WHOLE), random_tokens(0, 9)
    weights = tiny_weights(config, 0)
    for (layer, part), (inner, outer) in made.low_rank.items():
        names = {
            "qkv": [f"self_attn.{each}_proj" for each in "qkv"],
            "out": ["self_attn.o_proj"],
            "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
            "down": ["mlp.down_proj"],
        }[part]
        targets = [f"model.layers.{layer}.{name}.weight" for name in names]
        changes = (outer @ inner).split([len(weights[name]) for name in targets])
        for name, change in zip(targets, changes):
            weights[name] = weights[name] + change
    weights["model.embed_tokens.weight"][[80, 81]] = made.tensors["masks"]
    folded = Rank(Decoder(config, weights, TorchKernels(torch.float64), 64), KVCache(config, 1, 40, 24, torch.float64))
    expected = folded.forward([chain(folded.kv.allocate(), [*text, 80, 81])])
    rank = tiny_rank()
    slot = rank.kv.allocate()
    got = view_of(rank, made).forward([chain(slot, [*text, VOCAB, VOCAB + 1])])
    assert got.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    plain = rank.forward([chain(slot, text)])
    assert not np.allclose(plain.numpy(), expected.numpy()[:9], atol=1e-2), "the adapters change something"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.25)])
def test_both_forms_of_the_kernels_compute_the_same_view(dtype: str, tolerance: float) -> None:
    text, rows = random_tokens(1, 20), [3, VOCAB, VOCAB + 1]
    logits = []
    for kernels in ("torch", "native"):
        try:
            rank = rank_in(kernels, dtype)
        except ConfigError:
            pytest.skip("no native kernels here")
        logits.append(view_of(rank, adapter()).forward([chain(holding(rank, [*text, 3]), rows)]))
    assert logits[1].numpy() == pytest.approx(logits[0].numpy(), abs=tolerance)


def test_the_head_guesses_the_first_tokens_of_the_vocabulary_alone() -> None:
    short = S3DShape(
        **{name: getattr(SHAPE, name) for name in ("num_layers", "bottom", "top", "gamma", "rank")}, head_size=37
    )
    text, rank = random_tokens(2, 12), tiny_rank()
    slot = holding(rank, text)
    whole = view_of(rank, adapter()).forward([chain(slot, [text[-1], VOCAB])])
    part = view_of(rank, adapter(short)).forward([chain(slot, [text[-1], VOCAB])])
    assert part[:, :37].tolist() == whole[:, :37].tolist()
    assert bool((part[:, 37:] == -torch.inf).all())


def test_a_rank_of_several_has_no_view() -> None:
    rank = tiny_rank()
    rank.decoder.model = None
    with pytest.raises(ConfigError, match="tensor_parallel"):
        view_of(rank, adapter())


# ---- the drafter


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_all_layers_and_idle_adapters_guess_the_targets_next_token(params: SamplingParams) -> None:
    text = random_tokens(3, 15)
    drafter, _ = drafter_on(tiny_rank(), text, adapter(WHOLE, scale=0.0))
    drafter.begin("s", text, params, 15)
    tree = drafter.propose([Ask("s", 6, 3)], {})["s"]
    assert int(tree.tokens[0]) == continuation(tiny_rank(), text, params, 1)[0]


def test_a_draft_pass_leaves_the_target_as_it_was() -> None:
    rank, text = tiny_rank(), random_tokens(4, 20)
    drafter, slot = drafter_on(rank, text, adapter())
    drafter.begin("s", text, GREEDY, 20)
    rank.passes.clear()
    tree = drafter.propose([Ask("s", 8, 4)], {})["s"]
    tree.check(VOCAB, 8, 3)
    assert rank.passes == []
    assert rank.kv.length(slot) == 19
    verified = rank.forward([chain(slot, [text[-1], 3, 4])])
    untouched = tiny_rank()
    other = holding(untouched, text)
    assert verified.tolist() == untouched.forward([chain(other, [text[-1], 3, 4])]).tolist()


def test_it_follows_the_verifiers_commits_and_many_sessions_share_a_pass() -> None:
    rank, texts = tiny_rank(), [random_tokens(seed, 12) for seed in (5, 6)]
    slots = {str(index): holding(rank, text) for index, text in enumerate(texts)}
    drafter = S3DDrafter(rank, adapter(), S3DOptions(), max_len=100, slot_of=slots.get)
    for index, text in enumerate(texts):
        drafter.begin(str(index), text, SAMPLED, 12)
    for emitted in ([5], [6, 7, 8]):
        for index, text in enumerate(texts):
            rank.forward([chain(slots[str(index)], [text[-1], *emitted[:-1]])])
            rank.kv.commit(slots[str(index)], range(len(emitted)))
            drafter.commit(str(index), emitted)
            text += emitted
        trees = drafter.propose([Ask("1", 6, 3), Ask("0", 6, 2)], {})
        for index, depth in ((0, 2), (1, 3)):
            fresh, _ = drafter_on(tiny_rank(), texts[index], adapter())
            fresh.begin("s", texts[index], SAMPLED, 12)
            expected = fresh.propose([Ask("s", 6, depth)], {})["s"]
            tree = trees[str(index)]
            assert (tree.tokens.tolist(), tree.parents.tolist()) == (
                expected.tokens.tolist(),
                expected.parents.tolist(),
            )


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_behind_a_guess_of_the_stage_before_it_guesses_what_the_target_would_say_there(params: SamplingParams) -> None:
    text = random_tokens(3, 15)
    drafter, _ = drafter_on(tiny_rank(), text, adapter(WHOLE, scale=0.0), upstream_rows=2)
    drafter.begin("s", text, params, 15)
    own = int(drafter.propose([Ask("s", 1, 3)], {})["s"].tokens[0])
    said = [(own + 1) % VOCAB, (own + 2) % VOCAB]  # nobody else would have guessed so
    tree = drafter.propose([Ask("s", 9, 4)], {"s": TokenTree.chain(said, Origin.SMALL)})["s"]
    tree.check(VOCAB, 9, 4)
    for depth in (1, 2):
        node = next(node for node in range(len(tree)) if follow(tree, node) == said[:depth])
        children = [int(tree.tokens[child]) for child in np.flatnonzero(tree.parents == node)]
        assert tree.stages[node] == Origin.SMALL
        assert continuation(tiny_rank(), text + said[:depth], params, 1)[0] in children


def test_a_stage_before_whose_scores_rise_along_a_path_does_no_harm() -> None:
    text = random_tokens(5, 12)
    drafter, _ = drafter_on(tiny_rank(), text, adapter(), upstream_rows=1)
    drafter.begin("s", text, GREEDY, 12)
    lie = TokenTree.build([1, 2, 3], [-1, 0, -1], [0.1, 0.9, 0.2], int(Origin.SMALL))
    drafter.propose([Ask("s", 6, 3)], {"s": lie})["s"].check(VOCAB, 6, 3)


def follow(tree: TokenTree, node: int) -> list[int]:
    """The tokens down to a node."""
    return [int(tree.tokens[each]) for each in tree.path(node)]


def test_guesses_of_the_stage_before_without_rows_of_their_own_stand_beside() -> None:
    text = random_tokens(5, 12)
    drafter, _ = drafter_on(tiny_rank(), text, adapter(), upstream_rows=0)
    drafter.begin("s", text, GREEDY, 12)
    own = drafter.propose([Ask("s", 6, 3)], {})["s"]
    first, other = int(own.tokens[0]), (int(own.tokens[0]) + 1) % VOCAB
    hint = TokenTree.build([first, other], [-1, 0], [0.99, 0.98], int(Origin.SMALL))
    assert drafter.propose([Ask("s", 2, 3)], {"s": hint})["s"].tokens.tolist() == [first, other]
    tree = drafter.propose([Ask("s", 6, 3)], {"s": hint})["s"]
    tree.check(VOCAB, 6, 3)
    assert tree.tokens[:2].tolist() == [first, other]
    assert tree.stages.tolist() == [Origin.SMALL] * 2 + [Origin.MEDIUM] * 4


def test_it_waits_for_a_target_that_has_no_slot_or_has_not_read_the_prompt() -> None:
    rank, text = tiny_rank(), random_tokens(7, 12)
    drafter, _ = drafter_on(rank, text, adapter())
    drafter.begin("s", [*text, 1], GREEDY, 12)
    drafter.begin("slotless", text, GREEDY, 12)
    assert drafter.propose([Ask("s", 4, 4), Ask("slotless", 4, 4)], {}) == {}
    drafter.end("s")
    with pytest.raises(UnknownSession):
        drafter.propose([Ask("s", 4, 4)], {})


def test_fewer_tokens_are_guessed_where_asked_or_where_the_context_ends() -> None:
    text = random_tokens(8, 12)
    drafter, _ = drafter_on(tiny_rank(), text, adapter(), gamma=2, children=1)
    drafter.begin("s", text, GREEDY, 12)
    assert len(drafter.propose([Ask("s", 9, 9)], {})["s"]) == 2
    assert len(drafter.propose([Ask("s", 9, 1)], {})["s"]) == 1
    rank = tiny_rank()
    slots = {"s": holding(rank, text)}
    near = S3DDrafter(rank, adapter(), S3DOptions(children=1), max_len=12, slot_of=slots.get)
    near.begin("s", text, GREEDY, 12)
    assert len(near.propose([Ask("s", 9, 9)], {})["s"]) == 1

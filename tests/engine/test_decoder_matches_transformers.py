"""The decoder against the stock models: prompts, every node of a tree, and skipped sub-layers."""

from __future__ import annotations

import pytest
import torch
from engine_steps import TREE_PARENTS, chain, path_to, prefill, random_tokens, rows

MODELS = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one KV head per query": ("llama", {"num_key_value_heads": 6}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "smollm2 shape": ("llama", {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3, head_dim of its own": ("qwen3", {"head_dim": 80}),
    "qwen3, head_dim 128": ("qwen3", {"head_dim": 128, "num_attention_heads": 4}),
}


def stock_logits(model, tokens, dtype=torch.float32):
    with torch.no_grad():
        return model.to(dtype)(torch.tensor([tokens])).logits[0].float()


def assert_close(ours, stock):
    assert (ours - stock).abs().max() <= 2e-5 * stock.abs().max()


@pytest.mark.parametrize(("dtype", "kernels"), [("float32", "native"), ("float32", "torch"), ("float64", "torch")])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_prompt_and_of_every_tree_node_equal_the_stock_model(name, dtype, kernels, make_model, make_rank):
    family, changes = MODELS[name]
    model, folder = make_model(family, **changes)
    rank = make_rank(folder, dtype, kernels)
    kind = getattr(torch, dtype)
    tokens = random_tokens(70, 101)
    prompt, guesses = tokens[:-7], tokens[-7:]
    slot = rank.kv.allocate()
    assert_close(rank.forward([chain(slot, prompt)]), stock_logits(model, prompt, kind))
    rank.kv.commit(slot, range(len(prompt)))
    tree = rank.forward([rows(slot, guesses, TREE_PARENTS)])
    for row in range(7):
        path = [guesses[node] for node in path_to(row)]
        assert_close(tree[row], stock_logits(model, prompt + path, kind)[-1])


def test_bf16_stays_as_close_to_fp32_as_the_stock_bf16_model(make_model, make_rank):
    model, folder = make_model("llama")
    tokens = random_tokens(60, 101)
    exact = stock_logits(model, tokens)
    stock_error = (stock_logits(model, tokens, torch.bfloat16) - exact).abs().mean()
    model.to(torch.float32).load_state_dict(type(model).from_pretrained(folder).state_dict())
    for kernels in ("native", "torch"):
        rank = make_rank(folder, "bfloat16", kernels)
        error = (rank.forward([chain(rank.kv.allocate(), tokens)]) - exact).abs().mean()
        assert error < 1.3 * stock_error


def test_only_rows_that_want_logits_get_them_in_batch_order(make_model, make_rank):
    rank = make_rank(make_model("llama")[1])
    first, second = prefill(rank, [3, 4]), prefill(rank, [5])
    full = rank.forward([rows(first, [7, 8, 9], [-1, 0, 0]), rows(second, [1, 2], [-1, 0])])
    some = rank.forward(
        [
            rows(first, [7, 8, 9], [-1, 0, 0], logits=torch.tensor([True, False, True]).numpy()),
            rows(second, [1, 2], [-1, 0], logits=False),
        ]
    )
    assert torch.equal(some, full[[0, 2]])
    assert rank.forward([rows(first, [7], [-1], logits=False)]).shape == (0, 101)
    assert rank.forward([]).shape == (0, 101)


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_skipping_a_whole_layer_equals_the_model_without_it_and_leaves_nothing_behind(kernels, make_model, make_rank):
    model, folder = make_model("llama")
    rank = make_rank(folder, "float32", kernels)
    tokens = random_tokens(20, 101)
    slot = rank.kv.allocate()
    before = rank.forward([chain(slot, tokens)])
    skipped = rank.forward([chain(slot, tokens)], skip=frozenset({2, 3}))
    shorter = type(model)(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 2})).eval()
    names = {name: name.replace("layers.1.", "layers.2.") for name in shorter.state_dict()}
    shorter.load_state_dict({name: model.state_dict()[source] for name, source in names.items()})
    assert_close(skipped, stock_logits(shorter, tokens))
    assert (skipped - before).abs().max() > 0.1
    assert torch.equal(rank.forward([chain(slot, tokens)]), before)


def test_a_skipped_mlp_is_the_identity_and_a_skipped_attention_writes_no_keys(make_model, make_rank):
    model, folder = make_model("llama")
    rank = make_rank(folder)
    tokens = random_tokens(9, 101)
    slot = rank.kv.allocate()
    rank.forward([chain(slot, tokens)], skip=frozenset({2}))
    assert not rank.kv.keys[1][slot].any()
    assert rank.kv.keys[0][slot, :9].all()
    rank.forward([chain(slot, tokens)], skip=frozenset({3}))
    silenced = type(model)(model.config).eval()
    silenced.load_state_dict(model.state_dict())
    torch.nn.init.zeros_(silenced.model.layers[1].mlp.down_proj.weight)
    assert_close(rank.forward([chain(slot, tokens)], skip=frozenset({3})), stock_logits(silenced, tokens))

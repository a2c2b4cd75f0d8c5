"""The native kernels as lesser CPUs run them."""

from __future__ import annotations

import pytest
import torch
from engine_steps import TREE_PARENTS, path_to, prefill, random_tokens, rows

from cluster.engine import kernels_native
from cluster.engine.cpu import cpu_flags

PROMPT = random_tokens(83, 101, seed=1)
GUESSES = random_tokens(7, 101, seed=2)


@pytest.fixture(params=[("haswell", "avx2"), ("skylake-avx512", "avx512bw")], ids=["avx2", "avx512"])
def _compiled_for(request, monkeypatch):
    march, needed = request.param
    if needed not in cpu_flags():
        pytest.skip(f"this CPU has no {needed}")
    flags = [flag.replace("native", march) for flag in kernels_native.FLAGS]
    monkeypatch.setattr(kernels_native, "FLAGS", tuple(flags))
    kernels_native._library.cache_clear()
    yield
    kernels_native._library.cache_clear()


@pytest.mark.usefixtures("_compiled_for")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [12, 64, 80, 128])
def test_trees_equal_paths_and_other_kernels(dtype, dim, make_model, make_rank):
    folder = make_model("llama", head_dim=dim)[1]
    rank, other = make_rank(folder, dtype, "native"), make_rank(folder, dtype, "torch")
    tree = rank.forward([rows(prefill(rank, PROMPT), GUESSES, TREE_PARENTS)])
    for row in range(len(GUESSES)):
        path = [GUESSES[node] for node in path_to(row)]
        slot = prefill(rank, PROMPT + path[:-1], chunk=40)
        assert torch.equal(rank.forward([rows(slot, path[-1:], [-1])])[0], tree[row])
        rank.kv.free(slot)
    expected = other.forward([rows(prefill(other, PROMPT), GUESSES, TREE_PARENTS)])
    torch.testing.assert_close(tree, expected, rtol=0.0, atol=1e-3 if dtype == "float32" else 0.3)

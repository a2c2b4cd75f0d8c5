"""The GPU's kernels, on a GPU where there is one, in Triton's interpreter otherwise; and whether they compile."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_steps import TREE_PARENTS, chain, path_to, prefill, random_tokens, rows

from cluster.engine.kernels import KernelsUnavailable, choose_kernels
from cluster.engine.packed import LowRank

pytest.importorskip("triton")  # interpreted where there is no GPU: each program of a kernel takes milliseconds

MODELS = {
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24, "num_hidden_layers": 1}),
}
SIZES = {"num_slots": 3, "capacity": 100, "scratch": 8}
DTYPES = ("float32", "bfloat16")
TREE = random_tokens(7, 101, seed=1)


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


INTERPRETED_FOR_LONG = pytest.param(("qwen3", "bfloat16"), marks=pytest.mark.slow)


@pytest.fixture(params=[("llama with biases", "float32"), INTERPRETED_FOR_LONG], ids="-".join)
def ranks(request, make_model, make_rank):
    """Triton's, torch's, and torch's in fp32, over one model."""
    name, dtype = request.param
    family, changes = MODELS[name]
    folder = make_model(family, **changes)[1]
    kinds = ((dtype, "triton"), (dtype, "torch"), ("float32", "torch"))
    return tuple(make_rank(folder, *kind, **SIZES) for kind in kinds)


def assert_as_good(found, torchs, exact):
    """The interpreter cuts bits off where a GPU rounds, so bf16 values are somewhat farther off than torch's."""
    errors = [(each.float() - exact.float()).abs().mean() for each in (found, torchs)]
    assert errors[0] <= 4 * errors[1] + 2e-6 * exact.abs().max()


def test_a_session_gives_the_torch_forms_logits_and_bits_that_do_not_depend_on_company(ranks):
    assert ranks[0].row_invariant
    prompt = random_tokens(70, 101)  # more than one block of keys
    logits = []
    for rank in ranks:  # and each is compared with itself, bit for bit
        slot = prefill(rank, prompt, chunk=8)
        tree = rank.forward([rows(slot, TREE, TREE_PARENTS)])
        other = prefill(rank, prompt[:3])
        beside = rank.forward([chain(other, [5]), rows(slot, TREE[:1], [-1])])
        assert torch.equal(beside[1], tree[0])
        rank.forward([rows(slot, TREE, TREE_PARENTS)])
        rank.kv.commit(slot, path_to(6)[:-1])
        committed = rank.forward([chain(slot, [TREE[6]])])
        assert torch.equal(committed[0], tree[6])
        logits.append(torch.cat([tree, beside, rank.forward([chain(slot, TREE)], frozenset({0}))]))
    assert_as_good(*logits)


@pytest.mark.parametrize(("gated", "wide"), [(False, False), (False, True), (True, False)])
def test_a_linear_with_bias_residual_and_adapter_is_as_good_as_the_torch_forms(dtype, gated, wide):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().float()

    x, inner, weights, outers = random(5, 90), random(4, 90) / 8, random(2, 37, 90) / 8, random(2, 37, 4) / 2
    biases, residual = random(2, 37), random(5, 37)
    outcomes = []
    for kernels in (
        choose_kernels("triton", dtype),
        choose_kernels("torch", dtype),
        choose_kernels("torch", "float32"),
    ):
        linear, low_rank = compose(kernels, inner, weights, outers, biases, gated, wide)
        rows_in = kernels.place(x.to(kernels.dtype))
        before = None if wide else kernels.place(residual.to(kernels.dtype))
        outcomes.append([kernels.linear(rows_in, linear, before).cpu(), kernels.linear(rows_in, low_rank).cpu()])
        assert outcomes[-1][1].dtype == (torch.float32 if wide else kernels.dtype)
    for each in zip(*outcomes):
        assert_as_good(*each)


def compose(kernels, inner, weights, outers, biases, gated, wide):
    """A linear, and the same with an adapter."""

    def pack(pair, bias=None):
        one, other = pair.to(kernels.dtype)
        if gated:
            return kernels.pack_gated(one, other, *(() if bias is None else bias.to(kernels.dtype)))
        return kernels.pack(one, None if bias is None else bias[0].to(kernels.dtype), wide=wide)

    plain = pack(weights, biases)
    return plain, replace(plain, adapter=LowRank(kernels.pack(inner.to(kernels.dtype)), pack(outers)))


@pytest.mark.slow
def test_every_kernel_compiles_for_gpus_that_are_not_here():
    script = Path(__file__).with_name("compile_for_gpus.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 2 * 2 * 6


def test_a_machine_on_which_triton_cannot_launch_says_so_before_any_weight_is_read(monkeypatch):
    kernels_triton = pytest.importorskip("cluster.engine.kernels_triton")

    class Driver:
        @property
        def active(self):
            raise OSError("Python.h: No such file")

    monkeypatch.setattr(kernels_triton.triton.runtime, "driver", Driver())
    with pytest.raises(KernelsUnavailable, match=r"headers: Python\.h"):
        kernels_triton.check_launcher()

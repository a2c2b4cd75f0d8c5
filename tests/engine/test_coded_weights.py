"""bf16 weights kept in 12 bits: the same numbers come out, and what does not fit stays as it is."""

from __future__ import annotations

import shutil

import pytest
import torch
from engine_steps import TREE_PARENTS, chain, prefill, random_tokens, rows
from safetensors.torch import load_file, save_file

from cluster.engine import kernels_native
from cluster.engine.kernels_native import NativeKernels, _coded

VOCAB = 101
ODD = (0.0, -0.0, 1e-38, -3e-30, 2.5e4, float("nan"), -float("inf"))


@pytest.fixture(scope="module", autouse=True)
def _decoding():
    if not NativeKernels(torch.bfloat16, 1)._decodes:
        pytest.skip("this CPU does not take coded weights apart")


def blocks(steps: int, *odd: float) -> torch.Tensor:
    weight = torch.randn(3, steps, 16, 2, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight[2, steps - 2, 5, : len(odd)] = torch.tensor(odd).bfloat16()
    return weight


def decoded(coded: torch.Tensor, codes, shape: torch.Size) -> torch.Tensor:
    """As coded.h describes it, word by word."""
    words = torch.zeros(shape, dtype=torch.int32).view(shape[0], shape[1], 32)
    for block, groups in enumerate(coded):
        for group, held in enumerate(groups.tolist()):
            for line in range(4):
                for word in range(32):
                    at = word // 8 * 16 + line % 2 * 8 + word % 8
                    code = held[at] >> 4 if line >= 2 else held[at] & 15
                    low = held[64 + line // 2 * 64 + at]
                    words[block, 4 * group + line, word] = int(codes.upper[code]) << 8 | low
        strays = codes.strays[int(codes.starts[block]) :].view(torch.uint8).view(-1, 8).tolist()
        for step, line, word, bits in ((int.from_bytes(s[:4], "little"), s[4], s[5], s[6] | s[7] << 8) for s in strays):
            if step >= shape[1]:
                break
            words[block, step + line, word] = bits
    return words.to(torch.uint16).view(torch.bfloat16).view(shape)


@pytest.mark.parametrize("odd", [(), (1e-20, 7e9)])
def test_every_bit_comes_back(odd):
    weight = blocks(40, *odd)
    coded, codes = _coded(weight)
    assert coded.numel() == weight.numel() * 3 // 2
    assert torch.equal(decoded(coded, codes, weight.shape).view(torch.int16), weight.view(torch.int16))


def test_what_would_not_pay_stays_as_it_is():
    assert _coded(blocks(42)) is None
    scattered = torch.arange(3 * 40 * 32, dtype=torch.int32).mul(977).to(torch.int16).view(torch.bfloat16)
    assert _coded(scattered.view(3, 40, 16, 2)) is None


@pytest.mark.parametrize("odd", [(), ODD[:5], ODD], ids=["ordinary", "far apart", "not finite"])
def test_steps_are_bit_equal(odd, make_model, make_rank, monkeypatch, tmp_path):
    stock = make_model("llama", hidden_size=96, intermediate_size=104)[1]
    folder = shutil.copytree(stock, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    for weight in weights.values():
        if weight.dim() == 2:
            weight[3, : len(odd)] = torch.tensor(odd, dtype=weight.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(kernels_native, "FEW_STRAYS", 0.01)
    coded = make_rank(folder, "bfloat16", "native")
    layer = coded.decoder.model.layers[0]
    assert all(linear.codes for linear in (layer.qkv, layer.out, layer.gate_up, layer.down, coded.decoder.model.head))
    assert len(layer.down.codes.strays) >= len(layer.down.codes.starts) + bool(odd)
    monkeypatch.setattr(kernels_native, "FEW_STRAYS", -1)
    plain = make_rank(folder, "bfloat16", "native")
    assert plain.decoder.model.head.codes is None
    slots = [prefill(rank, random_tokens(40, VOCAB)) for rank in (coded, plain)]
    for count in (1, 2, 3, 5, 8, 9, 16, 23, 70):
        tokens = random_tokens(count, VOCAB, seed=count)
        results = [rank.forward([chain(slot, tokens)]) for rank, slot in zip((coded, plain), slots)]
        assert torch.equal(*(result.view(torch.int32) for result in results))
    tree = random_tokens(7, VOCAB)
    results = [rank.forward([rows(slot, tree, TREE_PARENTS)]) for rank, slot in zip((coded, plain), slots)]
    assert torch.equal(*(result.view(torch.int32) for result in results))

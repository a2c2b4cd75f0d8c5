"""bf16 weights kept in fewer bits: the same numbers come out, and what does not fit stays as it is."""

from __future__ import annotations

import shutil

import pytest
import torch
from engine_steps import TREE_PARENTS, chain, prefill, random_tokens, rows
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from cluster.engine import kernels_native, weight_forms
from cluster.engine.kernels_native import NativeKernels
from cluster.engine.packed import Form
from cluster.engine.weight_forms import AFFINE_BITS

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


def dequantised(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """weight: (outputs, inputs). What becomes of it in a GGUF file and in bf16."""
    how = GGMLQuantizationType[kind]
    return torch.from_numpy(dequantize(quantize(weight.float().numpy(), how), how)).bfloat16()


def in_blocks(weight: torch.Tensor) -> torch.Tensor:
    return NativeKernels(torch.bfloat16, 1)._blocks(weight).contiguous()


def twelve_bits(blocks: torch.Tensor):
    return weight_forms.twelve_bits(kernels_native._library(), blocks)


def affine(blocks: torch.Tensor, form: Form):
    return weight_forms.affine(kernels_native._library(), blocks, form)


def remade(made: torch.Tensor, form: Form, shape: torch.Size) -> torch.Tensor:
    """As affine.h describes it: code * d + m, group by group."""
    weight = torch.empty(shape[0], shape[1] // 16, 16, 16, 2)  # block, group, line, output, k
    scales = made[:, :, :64].view(torch.float16).float()
    steps, starts = scales[..., :16, None], scales[..., 16:, None]
    for line in range(16):
        if form is Form.EIGHT_BITS:
            codes = made[:, :, 64 + 32 * line : 96 + 32 * line]
        else:
            held = made[:, :, 64 + line // 4 * 64 :][..., line % 4 : 64 : 4]
            codes = torch.cat([held & 15, held >> 4], -1)
        weight[:, :, line] = codes.unflatten(-1, (16, 2)) * steps + starts
    return weight.bfloat16().view(shape)


def decoded(coded: torch.Tensor, codes, shape: torch.Size) -> torch.Tensor:
    """As twelve_bits.h describes it, word by word."""
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
    coded, codes = twelve_bits(weight)
    assert coded.numel() == weight.numel() * 3 // 2
    assert torch.equal(decoded(coded, codes, weight.shape).view(torch.int16), weight.view(torch.int16))


def test_what_would_not_pay_stays_as_it_is():
    assert twelve_bits(blocks(42)) is None
    scattered = torch.arange(3 * 40 * 32, dtype=torch.int32).mul(977).to(torch.int16).view(torch.bfloat16)
    assert twelve_bits(scattered.view(3, 40, 16, 2)) is None


QUANTISED = {"Q4_0": Form.FOUR_BITS, "Q4_1": Form.FOUR_BITS, "Q8_0": Form.EIGHT_BITS}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("scale", [1e-5, 0.05, 3.0, 900.0])
def test_codes_are_found_in_what_was_made_of_them(kind: str, scale: float) -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(2)) * scale
    weight[0, :32], weight[1, 32:64], weight[2, 5] = 0, scale, 40 * scale  # all the same; far from the others
    weight[3], weight[4] = weight[3].abs(), weight[4].abs().neg()
    blocks = in_blocks(dequantised(weight, kind))
    form = QUANTISED[kind]
    made = affine(blocks, form)
    assert made is not None
    assert made.numel() == blocks.numel() // 32 * (2 * AFFINE_BITS[form] + 2) * 2
    assert torch.equal(remade(made, form, blocks.shape), blocks)


@pytest.mark.parametrize("form", AFFINE_BITS)
def test_weights_of_another_make_are_not_coded(form: Form) -> None:
    kind = next(kind for kind, of in QUANTISED.items() if of is form)
    weight = dequantised(torch.randn(32, 64, generator=torch.Generator().manual_seed(3)), kind)
    assert affine(in_blocks(weight), form) is not None
    assert affine(in_blocks(weight[:, :48]), form) is None
    for odd in (float("nan"), float("inf"), 1e30, 0.123456):
        other = weight.clone()
        other[31, 40] = odd
        assert affine(in_blocks(other), form) is None
    assert affine(blocks(16), form) is None


def test_the_smallest_form_is_taken() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    forms = [
        weight_forms.smallest(kernels_native._library(), in_blocks(dequantised(weight, kind)))[1] for kind in QUANTISED
    ]
    assert [codes.form for codes in forms if codes] == list(QUANTISED.values())
    assert weight_forms.smallest(kernels_native._library(), blocks(40))[1].form is Form.TWELVE_BITS


ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 23, 70)


def assert_bit_equal(rank, plain) -> None:
    slots = [prefill(either, random_tokens(40, VOCAB)) for either in (rank, plain)]
    batches = [lambda slot, count=count: chain(slot, random_tokens(count, VOCAB, seed=count)) for count in ROWS]
    batches.append(lambda slot: rows(slot, random_tokens(7, VOCAB), TREE_PARENTS))
    for batch in batches:
        results = [either.forward([batch(slot)]) for either, slot in zip((rank, plain), slots)]
        assert torch.equal(*(result.view(torch.int32) for result in results))


def as_they_are(folder, make_rank, monkeypatch):
    """A rank of plain weights."""
    monkeypatch.setattr(kernels_native, "smallest", lambda library, blocks: (blocks, None))
    rank = make_rank(folder, "bfloat16", "native")
    assert rank.decoder.model.head.codes is None
    return rank


def linears(rank):
    layer = rank.decoder.model.layers[0]
    return layer.qkv, layer.out, layer.gate_up, layer.down, rank.decoder.model.head


@pytest.mark.parametrize("kind", QUANTISED)
def test_steps_with_codes_are_bit_equal(kind: str, make_model, make_rank, monkeypatch, tmp_path) -> None:
    stock = make_model("llama", hidden_size=96, intermediate_size=160)[1]
    folder = shutil.copytree(stock, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights = {name: dequantised(weight, kind) if weight.dim() == 2 else weight for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rank = make_rank(folder, "bfloat16", "native")
    assert {linear.codes.form for linear in linears(rank)} == {QUANTISED[kind]}
    assert_bit_equal(rank, as_they_are(folder, make_rank, monkeypatch))


@pytest.mark.parametrize("odd", [(), ODD[:5], ODD], ids=["ordinary", "far apart", "not finite"])
def test_steps_in_twelve_bits_are_bit_equal(odd, make_model, make_rank, monkeypatch, tmp_path):
    stock = make_model("llama", hidden_size=96, intermediate_size=104)[1]
    folder = shutil.copytree(stock, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    for weight in weights.values():
        if weight.dim() == 2:
            weight[3, : len(odd)] = torch.tensor(odd, dtype=weight.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(weight_forms, "FEW_STRAYS", 0.01)
    rank = make_rank(folder, "bfloat16", "native")
    assert {linear.codes.form for linear in linears(rank)} == {Form.TWELVE_BITS}
    down = rank.decoder.model.layers[0].down.codes
    assert len(down.strays) >= len(down.starts) + bool(odd)
    assert_bit_equal(rank, as_they_are(folder, make_rank, monkeypatch))

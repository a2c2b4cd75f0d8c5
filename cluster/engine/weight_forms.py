"""How ``kernels_native`` keeps bf16 weights: in as few bits as give the very same numbers back.

A step of few rows waits for weights to arrive from memory, so that fewer bytes make it faster.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_void_p

import torch

from cluster.engine.packed import Codes, Form

GROUP_STEPS, GROUP_BYTES = 4, 192  # of twelve bits; twelve_bits.h
AFFINE_STEPS = 16  # of a group; affine.h
AFFINE_BITS = {Form.FOUR_BITS: 4, Form.EIGHT_BITS: 8}
FEW_STRAYS = 0.0005  # of a matrix's weights; more of them would cost what twelve bits save


def smallest(library: ctypes.CDLL, blocks: torch.Tensor) -> tuple[torch.Tensor, Codes | None]:
    """blocks: (blocks, steps, 16, 2) bf16; the same in another form, where one fits, and what reads it."""
    blocks = blocks.contiguous()
    for form in AFFINE_BITS:
        made = affine(library, blocks, form)
        if made is not None:
            return made, Codes(form)
    return twelve_bits(library, blocks) or (blocks, None)


def affine(library: ctypes.CDLL, blocks: torch.Tensor, form: Form) -> torch.Tensor | None:
    """None where the weights do not come from such codes."""
    count, steps = blocks.shape[:2]
    if steps % AFFINE_STEPS:
        return None
    bits = AFFINE_BITS[form]
    made = torch.zeros((count, steps // AFFINE_STEPS, 64 + 64 * bits), dtype=torch.uint8)
    encode = library.encode_affine_bf16
    encode.argtypes, encode.restype = [c_void_p, c_int, c_int, c_int, c_void_p], c_int
    return made if encode(blocks.data_ptr(), count, steps, bits, made.data_ptr()) else None


def twelve_bits(library: ctypes.CDLL, blocks: torch.Tensor) -> tuple[torch.Tensor, Codes] | None:
    """None where they do not fit, or too many weights are out of the ordinary."""
    count, steps = blocks.shape[:2]
    if steps % GROUP_STEPS:
        return None
    uses = torch.bincount(blocks.view(torch.uint8)[..., 1::2].flatten(), minlength=256)
    upper = uses.topk(16).indices.to(torch.uint8)
    num_strays = blocks.numel() - int(uses[upper.long()].sum())
    if num_strays > FEW_STRAYS * blocks.numel():
        return None
    strays = torch.empty(num_strays + count, dtype=torch.int64)
    starts = torch.empty(count, dtype=torch.int32)
    coded = torch.zeros((count, steps // GROUP_STEPS, GROUP_BYTES), dtype=torch.uint8)
    encode = library.encode_bf16
    encode.argtypes, encode.restype = [c_void_p, c_int, c_int, *[c_void_p] * 4], None
    encode(blocks.data_ptr(), count, steps, *(part.data_ptr() for part in (upper, coded, strays, starts)))
    return coded, Codes(Form.TWELVE_BITS, upper, strays, starts)

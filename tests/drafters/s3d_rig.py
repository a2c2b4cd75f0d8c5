"""A tiny S3D adapter, and a target that holds a text for it."""

from __future__ import annotations

import torch
from tiny_models import VOCAB, chain, tiny_config

from cluster.engine.draft_view import DraftView
from cluster.engine.rank import Rank
from drafters.options import S3DOptions
from drafters.s3d import S3DDrafter
from drafters.s3d_adapter import S3DAdapter, S3DHeader, S3DShape

SHAPE = S3DShape(num_layers=4, bottom=1, top=2, gamma=3, rank=3, head_size=VOCAB)
WHOLE = S3DShape(num_layers=4, bottom=2, top=2, gamma=3, rank=3, head_size=VOCAB)


def adapter(shape: S3DShape = SHAPE, scale: float = 0.2) -> S3DAdapter:
    rng = torch.Generator().manual_seed(5)
    sizes = shape.sizes(tiny_config())
    tensors = {
        name: torch.randn(size, generator=rng, dtype=torch.float64) * (1.0 if name == "masks" else scale)
        for name, size in sizes.items()
    }
    return S3DAdapter(S3DHeader(VOCAB, "hash", shape), tensors)


def holding(rank: Rank, text: list[int]) -> int:
    """A slot of a target that has emitted ``text``: all but the last token are committed."""
    slot = rank.kv.allocate()
    rank.forward([chain(slot, text[:-1], logits=False)])
    rank.kv.commit(slot, range(len(text) - 1))
    return slot


def drafter_on(rank: Rank, text: list[int], made: S3DAdapter, **options: object) -> tuple[S3DDrafter, int]:
    slot = holding(rank, text)
    chosen = S3DOptions.model_validate(options)
    return S3DDrafter(rank, made, chosen, max_len=100, slot_of={"s": slot}.get), slot


def view_of(rank: Rank, made: S3DAdapter) -> DraftView:
    shape = made.header.shape
    return DraftView(rank, shape.skip, made.low_rank, made.tensors["masks"], shape.head_size)

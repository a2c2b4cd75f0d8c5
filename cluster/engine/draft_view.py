"""A target as a drafter runs it: some sub-layers left out, low-rank adapters on the others, mask tokens, a short head.

It shares the target's weights and its KV cache. The adapters belong to the view alone, so the target computes what it
would without it; what the view writes is scratch, which the next verify step overwrites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from cluster.core.errors import ConfigError
from cluster.engine.kernels import Kernels
from cluster.engine.kv_cache import SlotRows
from cluster.engine.packed import PackedLayer, PackedLinear
from cluster.engine.rank import Rank
from cluster.engine.rows import lay_out

Adapters = Mapping[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
"""(layer, ``qkv``, ``out``, ``gate_up`` or ``down``) -> inner (rank, inputs) and outer (outputs, rank)."""


class DraftView:
    """A forward pass of its own over ``rank``'s weights. Not thread-safe: it runs on the thread that drives the rank.

    skip: sub-layers left out; masks: (n, hidden), what token ids vocab_size ... vocab_size + n - 1 are embedded as;
    head_size: the first tokens of the vocabulary, all that it ever guesses. Raises ``ConfigError`` for one rank of
    several.
    """

    def __init__(
        self, rank: Rank, skip: frozenset[int], adapters: Adapters, masks: torch.Tensor, head_size: int
    ) -> None:
        model, kernels = rank.decoder.model, rank.decoder.kernels
        if model is None:
            raise ConfigError("tensor_parallel: a draft view needs the whole target on one rank; allowed: 1")
        self._rank, self._skip = rank, skip
        self.masks = kernels.place(masks.to(kernels.dtype))
        view = replace(
            model,
            layers=tuple(_adapted(kernels, layer, index, adapters) for index, layer in enumerate(model.layers)),
            head=replace(model.head, outputs=head_size),
            masks=self.masks,
        )
        self.model = view
        self._forward = kernels.forward_of(view)

    @property
    def num_bytes(self) -> int:
        """What it takes beside the target."""
        held = [self.masks]
        for layer in self.model.layers:
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
                if linear.adapter is not None:
                    held += [linear.adapter.inner.weight, linear.adapter.outer.weight]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @torch.inference_mode()
    def forward(self, batch: Sequence[SlotRows]) -> torch.Tensor:
        """As ``Rank.forward``: (rows wanting logits, head_size) fp32."""
        step = lay_out(batch, self._rank.kv, self._rank.config.vocab_size + len(self.masks))
        return self._forward(step, self._rank.kv, self._skip, None)


def _adapted(kernels: Kernels, layer: PackedLayer, index: int, adapters: Adapters) -> PackedLayer:
    def linear(part: str, packed: PackedLinear) -> PackedLinear:
        if (index, part) not in adapters:
            return packed
        return replace(packed, adapter=kernels.pack_adapter(*adapters[index, part], gated=packed.gated))

    return replace(
        layer,
        qkv=linear("qkv", layer.qkv),
        out=linear("out", layer.out),
        gate_up=linear("gate_up", layer.gate_up),
        down=linear("down", layer.down),
    )

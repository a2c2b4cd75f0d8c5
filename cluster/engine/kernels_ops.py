"""The decoder over a handful of operations, for kernels that are a call each: in torch, or on a GPU in Triton."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from cluster.engine.kernels import Forward, Kernels, MlpForward, ShardStep
from cluster.engine.kv_store import KVStore
from cluster.engine.packed import Heads, LowRank, PackedLinear, PackedMlpHead, PackedModel
from cluster.engine.rows import StepRows


class OperatorKernels(Kernels, ABC):
    """``Kernels`` but for packing and the operations themselves, which take and give tensors on ``device``.

    Steps come from the CPU, and a forward pass's results go back there; what ranks exchange stays on the device.
    """

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.dtype, self.device = name, dtype, device

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device).contiguous()

    def pack_adapter(self, inner: torch.Tensor, outer: torch.Tensor, *, gated: bool) -> LowRank:
        return LowRank(self.pack(inner), self.pack_gated(*outer.chunk(2)) if gated else self.pack(outer))

    @abstractmethod
    def linear(self, x: torch.Tensor, packed: PackedLinear, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(n, inputs) -> (n, outputs); ``residual`` (n, outputs) is added to the rounded result."""

    @abstractmethod
    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMS norm of each row: rounded after scaling to unit size, and again after the weight."""

    @abstractmethod
    def rope_store(
        self,
        qkv: torch.Tensor,
        heads: Heads,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        step: StepRows,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """qkv: (n, (heads + 2 * kv_heads) * dim). Norms and rotates queries in place; writes keys and values.

        norms: per-head weights of queries and keys, each (dim,). keys, values: one layer of the cache.
        """

    @abstractmethod
    def attention(
        self, qkv: torch.Tensor, heads: Heads, step: StepRows, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Each row over its prefix, its ancestors and itself, in position order: (n, heads * dim)."""

    def on_device(self, step: StepRows) -> StepRows:
        """The step's rows where the operations can read them; ``wanted`` stays with the caller's."""
        return step

    def forward_of(self, model: PackedModel) -> Forward:
        return functools.partial(self._forward, model)

    def shard_of(self, model: PackedModel) -> Callable[[StepRows, KVStore], ShardStep]:
        return functools.partial(_ShardStep, self, model)

    def mlp_of(self, model: PackedMlpHead) -> MlpForward:
        return _Mlp(self, model)

    def _forward(
        self, model: PackedModel, step: StepRows, kv: KVStore, skip: frozenset[int], features: torch.Tensor | None
    ) -> torch.Tensor:
        hidden = self.layers(model, self.on_device(step), kv, skip)
        return self.logits(model, hidden, step.wanted, features).cpu()

    def layers(self, model: PackedModel, step: StepRows, kv: KVStore, skip: frozenset[int]) -> torch.Tensor:
        """(n, hidden), before the final norm."""
        hidden = self.embed(model, step.tokens)
        for index in range(2 * len(model.layers)):
            if index not in skip:
                hidden = self.sub_layer(model, index, hidden, step, kv, residual=hidden)
        return hidden

    def embed(self, model: PackedModel, tokens: torch.Tensor) -> torch.Tensor:
        """(n,) -> (n, hidden)."""
        if model.masks is None or not len(model.masks):  # a view that guesses one token has a table of none
            return model.embedding[tokens]
        count = len(model.embedding)
        known = model.embedding[tokens.clamp(max=count - 1)]
        masks = model.masks[(tokens - count).clamp(min=0)]
        return torch.where((tokens < count)[:, None], known, masks)

    def sub_layer(
        self,
        model: PackedModel,
        index: int,
        hidden: torch.Tensor,
        step: StepRows,
        kv: KVStore,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention (even ``index``) or MLP (odd) of one layer over ``hidden``: (n, hidden), as ``linear`` gives it."""
        layer, eps = model.layers[index // 2], model.heads.eps
        if index % 2:
            inner = self.linear(self.norm(hidden, layer.mlp_norm, eps), layer.gate_up)
            return self.linear(inner, layer.down, residual)
        keys, values = kv.keys[index // 2], kv.values[index // 2]
        qkv = self.linear(self.norm(hidden, layer.input_norm, eps), layer.qkv)
        self.rope_store(qkv, model.heads, layer.qk_norms, step, keys, values)
        return self.linear(self.attention(qkv, model.heads, step, keys, values), layer.out, residual)

    def logits(
        self,
        model: PackedModel,
        hidden: torch.Tensor,
        wanted: torch.Tensor | None,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(wanted, vocab) fp32."""
        rows = hidden if wanted is None else hidden[wanted.to(self.device)]
        if not len(rows):
            return torch.empty((0, model.head.outputs), device=self.device)
        normed = self.norm(rows, model.final_norm, model.heads.eps)
        if features is not None:
            features.copy_(normed)
        return self.linear(normed, model.head).float()


class _ShardStep:
    """One step of a shard."""

    def __init__(self, kernels: OperatorKernels, model: PackedModel, step: StepRows, kv: KVStore) -> None:
        self._kernels, self._model, self._kv = kernels, model, kv
        self._rows, self._wanted = kernels.on_device(step), step.wanted

    def addend(self, sub_layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return self._kernels.sub_layer(self._model, sub_layer, hidden, self._rows, self._kv)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._kernels.logits(self._model, hidden, self._wanted)


class _Mlp:
    """The network that guesses on from hidden states."""

    def __init__(self, kernels: OperatorKernels, model: PackedMlpHead) -> None:
        self._kernels, self._model = kernels, model

    def advance(self, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        kernels, model = self._kernels, self._model
        known = kernels.norm(states.to(kernels.device), model.state_norm, model.eps)
        new = kernels.norm(model.embedding[tokens.to(kernels.device)], model.token_norm, model.eps)
        x = kernels.linear(torch.cat([known, new], 1), model.mix)
        for block in model.blocks:
            x = kernels.linear(kernels.linear(kernels.norm(x, block.norm, model.eps), block.gate_up), block.down, x)
        return x.cpu()

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        normed = self._kernels.norm(states.to(self._kernels.device), self._model.final_norm, self._model.eps)
        return self._kernels.linear(normed, self._model.head).float().cpu()

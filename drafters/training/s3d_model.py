"""The two-stream forward that trains S3D's masks and adapters, in plain torch. The target's own weights are frozen.

Stream A is the clean text through all layers: it gives the keys and values the draft will find in the target's cache,
and the distributions it is to guess. Stream B are groups ``[x_t, M_1 ... M_{gamma-1}]`` at some positions t, through
the kept layers alone: each row sees A's keys before t and its own group up to itself, which is exactly what a draft
pass sees. Row i of a group is to guess token t + i + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from cluster.engine.model_config import DecoderConfig
from drafters.s3d_adapter import S3DShape

KeyValue = tuple[torch.Tensor, torch.Tensor]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class TwoStream:
    """A frozen target and what is trained on it.

    weights: named as in the stock model; the dtype computed in is theirs. ``trained``: fp32, by ``shape.sizes``' names.
    """

    def __init__(self, config: DecoderConfig, weights: Mapping[str, torch.Tensor], shape: S3DShape) -> None:
        self.config, self.shape = config, shape
        self._weights = _fuse(config, weights)
        self._embedding = weights["model.embed_tokens.weight"]
        head = self._embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        self._head = head[: shape.head_size]
        self._final_norm = weights["model.norm.weight"]
        self._inv_freq = torch.tensor(config.inv_freq, device=self._embedding.device)
        self.trained = _start(shape, config, self._embedding)

    def clean(self, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[int, KeyValue]]:
        """Stream A. tokens: (n,). Returns the last hidden states (n, hidden), and kept layers' keys and values."""
        kept: dict[int, KeyValue] = {}

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if layer in self.shape.kept:
                kept[layer] = k, v
            return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]

        with torch.no_grad():
            x = self._embedding[tokens]
            positions = torch.arange(len(tokens), device=tokens.device)
            for layer in range(self.config.num_layers):
                x = self._layer(layer, x, positions, attend, adapted=False)
        return x, kept

    def draft(self, tokens: torch.Tensor, starts: torch.Tensor, kept: Mapping[int, KeyValue]) -> torch.Tensor:
        """Stream B: a group behind each of ``starts`` (g,), positions in ``tokens``. Returns (g, gamma, hidden)."""
        gamma, count, device = self.shape.gamma, len(starts), tokens.device
        masks = self.trained["masks"].to(self._embedding.dtype).expand(count, -1, -1)
        x = torch.cat([self._embedding[tokens[starts]][:, None], masks], 1).flatten(0, 1)
        behind = torch.arange(len(tokens), device=device) >= starts[:, None]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return _attend_groups(q, k, v, kept[layer], behind)

        positions = (starts[:, None] + torch.arange(gamma, device=device)).flatten()
        for layer in self.shape.kept:
            x = self._layer(layer, x, positions, attend, adapted=True)
        return x.view(count, gamma, -1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., head_size) fp32: the part of the vocabulary the draft's head knows."""
        return F.linear(self._norm(hidden, self._final_norm), self._head).float()

    def _layer(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, attend: Attend, *, adapted: bool
    ) -> torch.Tensor:
        """x: (n, hidden). ``attend`` gets queries (heads, n, dim) and the rows' own keys and values (kv_heads, ...)."""
        config = self.config
        prefix = f"layers.{layer}"
        qkv = self._linear(f"{prefix}.qkv", self._norm(x, self._weights[f"{prefix}.input_norm"]), adapted)
        heads = qkv.view(len(x), -1, config.head_dim).transpose(0, 1)
        q, k, v = torch.split(heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads])
        if config.qk_norm:
            q = self._norm(q, self._weights[f"{prefix}.q_norm"])
            k = self._norm(k, self._weights[f"{prefix}.k_norm"])
        mixed = attend(layer, self._rotate(q, positions), self._rotate(k, positions), v)
        x = x + self._linear(f"{prefix}.out", mixed.transpose(0, 1).flatten(1), adapted)
        gate, up = self._linear(f"{prefix}.gate_up", self._norm(x, self._weights[f"{prefix}.mlp_norm"]), adapted).chunk(
            2, -1
        )
        return x + self._linear(f"{prefix}.down", F.silu(gate) * up, adapted)

    def _linear(self, name: str, x: torch.Tensor, adapted: bool) -> torch.Tensor:
        y = F.linear(x, self._weights[name], self._weights.get(f"{name}.bias"))
        if not adapted:
            return y
        inner, outer = (self.trained[f"{name}.{part}"].to(x.dtype) for part in ("inner", "outer"))
        return y + F.linear(F.linear(x, inner), outer)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x: (heads, n, dim)."""
        angles = positions[:, None] * self._inv_freq
        cos, sin = ((part * self.config.rope_scaling).to(x.dtype).repeat(1, 2) for part in (angles.cos(), angles.sin()))
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin


def loss_of(
    model: TwoStream, tokens: torch.Tensor, starts: torch.Tensor, decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL from the target's distributions to the draft's, position i weighted ``decay ** i``.

    tokens: (n,); starts: (g,), each with gamma tokens behind it. Returns the mean loss, and (g, gamma, head_size)
    detached logits of the draft.
    """
    hidden, kept = model.clean(tokens)
    steps = torch.arange(model.shape.gamma, device=tokens.device)
    with torch.no_grad():
        # Groups overlap: each position's distribution is computed once.
        log_probs = torch.log_softmax(model.logits(hidden), -1)
        probs = log_probs.exp()
        places = starts[:, None] + steps
        wanted, entropy = probs[places], -torch.linalg.vecdot(probs, log_probs)[places]
    logits = model.logits(model.draft(tokens, starts, kept))
    crossed = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1), reduction="none").view_as(entropy)
    weights = decay**steps
    return ((crossed - entropy) * weights).sum(-1).mean() / weights.sum(), logits.detach()


def _attend_groups(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, clean: KeyValue, behind: torch.Tensor
) -> torch.Tensor:
    """Each group over the clean keys before it and, causally, its own. The two are apart: a group has few keys of its
    own, and one dense mask over all groups' would cost more than the rest of the layer.

    q: (heads, g * gamma, dim); k, v: (kv_heads, g * gamma, dim); clean: (kv_heads, n, dim) each; behind: (g, n) bool,
    the clean keys a group does not see.
    """
    kv_heads, dim, groups, size = len(k), q.shape[-1], *behind.shape
    grouped = (q / dim**0.5).view(kv_heads, -1, groups, q.shape[1] // groups, dim)
    share, gamma = grouped.shape[1], grouped.shape[3]
    hidden = torch.ones(gamma, gamma, dtype=torch.bool, device=q.device).triu(1)
    k, v = (part.view(kv_heads, 1, groups, gamma, dim) for part in (k, v))
    before = (grouped.flatten(1, 3) @ clean[0].transpose(1, 2)).view(kv_heads, share, groups, gamma, size)
    before = before.masked_fill(behind[:, None], -torch.inf)
    own = (grouped @ k.transpose(-1, -2)).masked_fill(hidden, -torch.inf)
    weights = torch.softmax(torch.cat([before, own], -1), -1)
    result = (weights[..., :size].flatten(1, 3) @ clean[1]).view_as(grouped) + weights[..., size:] @ v
    return result.view(q.shape)


def _fuse(config: DecoderConfig, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layers' weights under the adapters' names, queries, keys and values in one, and gate and up."""
    fused: dict[str, torch.Tensor] = {}
    for layer in range(config.num_layers):
        source, name = f"model.layers.{layer}", f"layers.{layer}"
        parts = {
            "qkv": [f"self_attn.{part}_proj" for part in "qkv"],
            "out": ["self_attn.o_proj"],
            "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
            "down": ["mlp.down_proj"],
        }
        for part, names in parts.items():
            fused[f"{name}.{part}"] = torch.cat([weights[f"{source}.{each}.weight"] for each in names])
            biases = [weights[f"{source}.{each}.bias"] for each in names if f"{source}.{each}.bias" in weights]
            if biases:
                fused[f"{name}.{part}.bias"] = torch.cat(biases)
        fused[f"{name}.input_norm"] = weights[f"{source}.input_layernorm.weight"]
        fused[f"{name}.mlp_norm"] = weights[f"{source}.post_attention_layernorm.weight"]
        if config.qk_norm:
            fused[f"{name}.q_norm"] = weights[f"{source}.self_attn.q_norm.weight"]
            fused[f"{name}.k_norm"] = weights[f"{source}.self_attn.k_norm.weight"]
    return fused


def _start(shape: S3DShape, config: DecoderConfig, embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    """Masks near the mean embedding; adapters that change nothing yet. The same every time."""
    rng = torch.Generator().manual_seed(0)
    trained: dict[str, torch.Tensor] = {}
    for name, size in shape.sizes(config).items():
        if name == "masks":
            noise = torch.randn(size, generator=rng) * embedding.float().std()
            value = embedding.float().mean(0) + 0.1 * noise
        elif name.endswith(".inner"):
            value = torch.randn(size, generator=rng) / size[1] ** 0.5
        else:
            value = torch.zeros(size)
        trained[name] = value.to(embedding.device).requires_grad_()
    return trained

"""Which part of the model a tensor-parallel rank holds.

Attention is cut by heads; K/V heads are cut alike, or held by several ranks where there are fewer of them than ranks.
The MLP is cut by its inner width and the vocabulary by token ids, both evenly to within one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.core.errors import ConfigError
from cluster.engine.model_config import DecoderConfig

Cut = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank ``rank`` of ``size``. The default is the whole model."""

    rank: int = 0
    size: int = 1

    def share(self, total: int) -> slice:
        """The rank's part of ``total`` things in a row."""
        return slice(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """What this rank's decoder computes: fewer heads and a narrower MLP. The vocabulary stays the model's."""
        return replace(
            config,
            num_heads=_count(self.share(config.num_heads)),
            num_kv_heads=_count(self._kv_share(config.num_kv_heads)),
            intermediate_size=_count(self.share(config.intermediate_size)),
        )

    def cut(self, name: str, config: DecoderConfig) -> Cut | None:
        """The part of a stock tensor that this rank holds; None where it is not this rank's at all.

        ``config`` is the whole model's. The bias of a sum over ranks belongs to rank 0: it must be added once.
        """
        kind = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        bias = name.endswith(".bias")
        heads = _scaled(self.share(config.num_heads), config.head_dim)
        kv_heads = _scaled(self._kv_share(config.num_kv_heads), config.head_dim)
        inner, vocab = self.share(config.intermediate_size), self.share(config.vocab_size)
        rows = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads, "gate_proj": inner, "up_proj": inner}
        rows |= {"embed_tokens": vocab, "lm_head": vocab}
        columns = {"o_proj": heads, "down_proj": inner}
        if kind in columns:
            if bias:
                return (slice(None),) if self.rank == 0 else None
            return slice(None), columns[kind]
        return (rows.get(kind, slice(None)),)

    def _kv_share(self, num_kv_heads: int) -> slice:
        if num_kv_heads >= self.size:
            return self.share(num_kv_heads)
        head = self.rank * num_kv_heads // self.size
        return slice(head, head + 1)


def allowed_sizes(config: DecoderConfig) -> list[int]:
    """Numbers of ranks that share out the heads evenly."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    return [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]


def check_size(config: DecoderConfig, size: int) -> None:
    """Raises ``ConfigError`` where ``size`` ranks cannot share the model, naming its sizes and what is allowed."""
    allowed = allowed_sizes(config)
    if size not in allowed:
        raise ConfigError(
            f"tensor_parallel_size: {size} ranks cannot share {config.num_heads} attention heads and "
            f"{config.num_kv_heads} KV heads evenly; allowed for this model: {', '.join(map(str, allowed))}"
        )


def _count(part: slice) -> int:
    return int(part.stop - part.start)


def _scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)

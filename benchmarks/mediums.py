"""Medium stages for ``benchmarks.staged``: loaded once, counted, and fed without a target at work beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.accepted_length import Record
from cluster.engine.decoder import Decoder
from cluster.engine.kernels import MlpForward, choose_kernels
from cluster.engine.kv_cache import KVCache, SlotRows
from cluster.engine.model_config import DecoderConfig
from cluster.engine.rank import Rank, Tip, build_rank
from cluster.engine.weights import read_config
from drafters.base import Drafter
from drafters.distilled import DraftHeader, find_draft, load_draft
from drafters.draft_model import ModelDrafter, OwnSlots
from drafters.mlp_head import HeadHeader, find_head
from drafters.mlp_speculator import MlpSpeculator, load_mlp
from drafters.options import GrowthOptions, MlpOptions


class Medium(Protocol):
    """passes, nodes: passes of each session, and nodes evaluated in them. weight: numbers read in a pass, beside those
    of a target's pass. agreement: share of the answers' tokens that are its likeliest. sessions: replayed at once."""

    sessions: int
    passes: int
    nodes: int
    weight: float
    agreement: float
    provenance: Mapping[str, Any]

    def drafter(self, options: Mapping[str, float]) -> Drafter: ...

    def follow(self, session_id: str, length: int) -> None:
        """The record ``session_id`` has been followed so far: what the target would have left behind is put there."""
        ...


def layer_weights(config: DecoderConfig) -> int:
    """Numbers in a layer's matrices."""
    width = config.num_heads * config.head_dim
    attention = config.hidden_size * (2 * width + 2 * config.num_kv_heads * config.head_dim)
    return attention + 3 * config.hidden_size * config.intermediate_size


def target_weights(config: DecoderConfig) -> int:
    """Numbers a pass of the target reads; embeddings are looked up, not read."""
    return config.num_layers * layer_weights(config) + config.hidden_size * config.vocab_size


class _CountingRank(Rank):
    passes = nodes = 0

    def forward(self, batch: Sequence[SlotRows], *given: Any, **named: Any) -> torch.Tensor:
        self.passes += len(batch)
        self.nodes += sum(int(np.sum(rows.logits)) for rows in batch)
        return super().forward(batch, *given, **named)


class DistilledMedium:
    """A draft model of ``drafters.training.distill``. Each session's row block counts as a pass of its own."""

    sessions = 8

    def __init__(self, source: str, target: Path, records: Sequence[Record], dtype: str, threads: int) -> None:
        folder = find_draft(source, target)
        if folder is None:
            raise SystemExit(f"--draft: {source} is not a folder that drafters.training.distill made")
        kernels = choose_kernels("auto", dtype, threads)
        config, weights, head_tokens = load_draft(folder, target, kernels.dtype)
        self._longest = max(len(record.prompt) + len(record.output) for record in records) + 1
        decoder = Decoder(config, weights, kernels, 2 * self._longest + 256, head_tokens=head_tokens)
        self._rank = _CountingRank(
            decoder, KVCache(config, self.sessions, self._longest, self._longest + 256, kernels.dtype, kernels.device)
        )
        self.provenance = DraftHeader.read(folder).provenance
        read = config.num_layers * layer_weights(config) + config.hidden_size * len(head_tokens)
        self.weight = read / target_weights(read_config(target))
        self.agreement = agreement(self._rank, records)
        self._rank.passes = self._rank.nodes = 0

    @property
    def passes(self) -> int:
        return self._rank.passes

    @property
    def nodes(self) -> int:
        return self._rank.nodes

    def drafter(self, options: Mapping[str, float]) -> Drafter:
        growth = GrowthOptions.model_validate({**options, "prefill_chunk": self._longest})
        return ModelDrafter(self._rank, OwnSlots(self._rank.kv, self._longest), growth, max_len=self._longest)

    def follow(self, session_id: str, length: int) -> None:
        """It reads the text itself."""


def agreement(rank: Rank, records: Sequence[Record]) -> float:
    hits: list[bool] = []
    for record in records:
        slot = rank.kv.allocate()
        text = record.prompt + record.output
        likeliest = rank.forward([chain(slot, text, len(record.prompt) - 1)]).argmax(1).numpy()
        rank.kv.free(slot)
        hits += (likeliest[:-1] == np.array(record.output)).tolist()
    return float(np.mean(hits))


def chain(slot: int, text: Sequence[int], first: int) -> SlotRows:
    """All of a text, with logits from token ``first`` on."""
    tokens = np.asarray(text, np.int32)
    wanted = np.arange(len(tokens)) >= first
    return SlotRows(slot, tokens, np.arange(-1, len(tokens) - 1, dtype=np.int32), logits=wanted)


class _CountingMlp:
    def __init__(self, inner: MlpForward) -> None:
        self._inner = inner
        self.passes = self.nodes = 0

    def advance(self, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return self._inner.advance(tokens, states)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        self.nodes += len(states)
        return self._inner.logits(states)


class HeadMedium:
    """A network of ``drafters.training.train_head``, on hidden states that the target computes once, at the start."""

    sessions = 1

    def __init__(self, source: str, target: Path, records: Sequence[Record], dtype: str, threads: int) -> None:
        longest = max(len(record.prompt) + len(record.output) for record in records)
        self._rank = build_rank(target, dtype, num_slots=1, capacity=1, scratch=longest, threads=threads)
        folder = find_head(source, target)
        forward, self._head_tokens = load_mlp(folder, target, self._rank)
        self._forward = _CountingMlp(forward)
        self._first = [len(record.prompt) - 1 for record in records]
        self._states = [self._hidden(record) for record in records]
        self._rank.tips = {}
        header = HeadHeader.read(folder)
        self.provenance = header.provenance
        hidden = header.hidden_size
        read = 2 * hidden * hidden + 3 * header.blocks * hidden * header.inner_size + hidden * len(self._head_tokens)
        self.weight = read / target_weights(self._rank.config)
        self.agreement = float(np.mean([hit for pair in zip(records, self._states) for hit in self._hits(*pair)]))
        self._forward.passes = self._forward.nodes = 0

    @property
    def passes(self) -> int:
        return self._forward.passes

    @property
    def nodes(self) -> int:
        return self._forward.nodes

    def drafter(self, options: Mapping[str, float]) -> Drafter:
        chosen = MlpOptions.model_validate(options)
        return MlpSpeculator(self._rank, int, (self._forward, self._head_tokens), chosen)

    def follow(self, session_id: str, length: int) -> None:
        tips, index = self._rank.tips, int(session_id)
        assert tips is not None
        decided_by = length - 2 - self._first[index]  # the state behind the token before the newest
        if decided_by >= 0:
            tips[index] = Tip(length, self._states[index][decided_by])

    def _hidden(self, record: Record) -> torch.Tensor:
        """(tokens of the answer + 1, hidden): behind the prompt's last token and each of the answer's."""
        slot = self._rank.kv.allocate()
        count = len(record.output) + 1
        features = torch.empty((count, self._rank.config.hidden_size), dtype=self._rank.decoder.kernels.dtype)
        self._rank.forward([chain(slot, record.prompt + record.output, len(record.prompt) - 1)], features=features)
        self._rank.kv.free(slot)
        return features

    def _hits(self, record: Record, states: torch.Tensor) -> list[bool]:
        """Of the answer's tokens but the first: whether each is the likeliest, a step behind the target's state."""
        if len(record.output) < 2:
            return []
        following = self._forward.advance(
            torch.tensor(record.output[:-1]), states[: len(record.output) - 1].contiguous()
        )
        guessed = self._head_tokens[self._forward.logits(following).argmax(1)]
        return (guessed == torch.tensor(record.output[1:])).tolist()  # type: ignore[no-any-return]

"""A model cut over several ranks: rank 0 drives, the others follow orders. docs/tensor_parallel.md tells the story.

Rank 0 keeps all bookkeeping and looks like any other ``Rank`` to the verifier and to drafters that run on it. One order
goes out per step; the others have no state beyond their weights, their keys and their values. How they are started and
watched is a ``Crew``'s business (``crew.py`` on this machine, ``cluster/launch.py`` on Ray).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from cluster.core.config import ModelConfig
from cluster.core.errors import ConfigError, EngineDied
from cluster.engine.collectives import LOOPBACK, Address, Meeting, RankGroup, RankLost
from cluster.engine.decoder import Decoder
from cluster.engine.kernels import Kernels, choose_kernels
from cluster.engine.kv_cache import KVCache, SlotRows
from cluster.engine.kv_store import KVStore, Move
from cluster.engine.model_config import DecoderConfig
from cluster.engine.orders import Order, decode, encode
from cluster.engine.rank import Rank, build_rank, check_window
from cluster.engine.rows import lay_out
from cluster.engine.shard import Shard, check_size
from cluster.engine.weights import load_weights, read_config

STOP = np.empty(0, np.int64)
REASON_WAIT_S = 2.0  # a rank's connection breaks a moment before its end is known


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """All a rank must know to load its shard and to find the others.

    folder: the model's, on rank 0's machine. config: the whole model's. meeting: where rank 0 waits for the others.
    limit_s: how long they wait for each other in a step.
    """

    folder: Path
    config: DecoderConfig
    dtype: str
    kernels: str
    threads: int
    num_slots: int
    capacity: int
    scratch: int
    meeting: Address
    limit_s: float
    shard: Shard


class Crew(Protocol):
    """Ranks 1, 2, ... as rank 0 sees them."""

    @property
    def pids(self) -> dict[str, int]: ...

    def failure(self) -> str:
        """Which rank has ended, and how; empty while all run."""
        ...

    def close(self) -> None:
        """Wait for the ranks, which have been told to stop, for a moment, and end those that remain."""
        ...


Recruit = Callable[[Sequence[RankPlan]], Crew]
"""Start a rank for each plan, each running ``follow``; returns at once."""


@dataclass(frozen=True, slots=True)
class Recruiter:
    """How the other ranks are started, and ``host``, this machine's address as ranks elsewhere reach it."""

    recruit: Recruit
    host: str = LOOPBACK


class MirroredKVCache(KVCache):
    """Rank 0's cache: notes which positions it moves, for the others to move theirs, and whether they are there."""

    def __init__(self, config: DecoderConfig, plan: RankPlan, kernels: Kernels, failure: Callable[[], str]) -> None:
        super().__init__(config, plan.num_slots, plan.capacity, plan.scratch, kernels.dtype, kernels.device)
        self._moves: list[Move] = []
        self._failure = failure

    def move(self, move: Move) -> None:
        super().move(move)
        self._moves.append(move)

    def take_moves(self) -> list[Move]:
        """The moves since the last call."""
        moves, self._moves = self._moves, []
        return moves

    def check(self) -> None:
        """Raises ``EngineDied`` too, where a rank's keys and values are gone with it."""
        super().check()
        if reason := self._failure():
            raise EngineDied(f"tensor parallel: {reason}")


class ShardedRank(Rank):
    """Rank 0 of several. After a failure within a step the ranks are out of step for good: every call raises."""

    kv: MirroredKVCache

    def __init__(self, decoder: Decoder, kv: MirroredKVCache, group: RankGroup, crew: Crew) -> None:
        super().__init__(decoder, kv)
        self.crew = crew
        self._group = group
        self._broken = ""
        self._in_step = False

    @torch.inference_mode()
    def forward(
        self,
        batch: Sequence[SlotRows],
        skip: frozenset[int] = frozenset(),
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Rank.forward``; there are no ``features`` here.

        Raises ``EngineDied`` where a rank is gone or takes longer than the limit.
        """
        if not batch:
            return torch.empty((0, self.config.vocab_size))
        if self._broken:
            raise EngineDied(self._broken)
        step = lay_out(batch, self.kv, self.config.vocab_size)
        self._in_step = True
        try:
            self._group.send(encode(Order(step, skip, self.kv.take_moves())))
            logits = self.decoder.forward(step, self.kv, skip, features)
        except RankLost as error:
            self._broken = loss_reason(error, self.crew)
            raise EngineDied(self._broken) from error
        except BaseException as error:
            self._broken = f"tensor parallel: {type(error).__name__} within a step; the ranks are out of step"
            raise
        self._in_step = False
        return logits

    @property
    def peer_pids(self) -> dict[str, int]:
        return self.crew.pids

    def close(self) -> None:
        """Stop the other ranks; from any thread once no step runs, or while one is stuck."""
        if not self._in_step:
            try:
                self._group.send(STOP)
            except RankLost:
                self._broken = "tensor parallel: the ranks are gone"
        self.crew.close()


def loss_reason(error: RankLost, crew: Crew) -> str:
    """What happened, by the crew's word where it has one."""
    deadline = time.monotonic() + REASON_WAIT_S
    while not (reason := crew.failure()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return f"tensor parallel: {reason or 'a rank does not answer'} ({error})"


def load_rank(
    folder: Path, model: ModelConfig, recruiter: Recruiter | None, *, num_slots: int, capacity: int, scratch: int
) -> Rank:
    """A model as its configuration says: on one rank, or the first of several, for which it takes ``recruiter``.

    Raises as ``build_rank`` and ``build_sharded_rank``, and ``ConfigError`` for several without a ``recruiter``.
    """
    sizes = {"num_slots": num_slots, "capacity": capacity, "scratch": scratch}
    size = model.tensor_parallel_size
    if size == 1:
        return build_rank(folder, model.dtype, kernels=model.kernels, threads=model.threads, **sizes)
    if recruiter is None:
        raise ConfigError(f"model.tensor_parallel_size: {size} is for remote stages and targets; allowed here: 1")
    return build_sharded_rank(
        folder,
        model.dtype,
        size,
        recruiter.recruit,
        kernels=model.kernels,
        threads=model.threads,
        limit_s=model.rank_limit_s,
        host=recruiter.host,
        **sizes,
    )


def build_sharded_rank(
    folder: Path,
    dtype: str,
    size: int,
    recruit: Recruit,
    *,
    num_slots: int,
    capacity: int,
    scratch: int,
    kernels: str = "auto",
    threads: int = 0,
    limit_s: float = 30.0,
    host: str = LOOPBACK,
) -> ShardedRank:
    """Rank 0 of ``size``, the others started by ``recruit``; returns once all have loaded their shards.

    threads: of each rank; 0 shares torch's number out. host: this machine's address, as ranks elsewhere reach it.
    Raises ``ConfigError`` for what cannot be served, before any weight is read; ``EngineDied`` where a rank does not
    come up.
    """
    config = read_config(folder)
    check_size(config, size)
    check_window(config, capacity)
    threads = threads or max(1, torch.get_num_threads() // size)
    torch.set_num_threads(threads)
    chosen = choose_kernels(kernels, dtype, threads)
    meeting = Meeting.call(host)
    plan = RankPlan(
        folder=folder,
        config=config,
        dtype=dtype,
        kernels=chosen.name,
        threads=threads,
        num_slots=num_slots,
        capacity=capacity,
        scratch=scratch,
        meeting=meeting.address,
        limit_s=limit_s,
        shard=Shard(0, size),
    )
    crew = recruit([replace(plan, shard=Shard(rank, size)) for rank in range(1, size)])
    try:
        group = RankGroup(meeting, plan.shard, limit_s, chosen.device.type, crew.failure)
        decoder = _load(plan, chosen, group)
        group.wait_for_all()
        rank = ShardedRank(decoder, MirroredKVCache(decoder.config, plan, chosen, crew.failure), group, crew)
        rank.warn_if_not_row_invariant()
    except RankLost as error:
        reason = loss_reason(error, crew)
        crew.close()
        raise EngineDied(reason) from error
    except BaseException:
        crew.close()
        raise
    return rank


def follow(plan: RankPlan) -> None:
    """The life of every other rank: load the shard, then obey, until rank 0 says stop.

    Raises ``RankLost`` where rank 0, or another rank, is gone.
    """
    torch.set_num_threads(plan.threads)
    kernels = choose_kernels(plan.kernels, plan.dtype, plan.threads, plan.shard.rank)
    group = RankGroup(Meeting.join(plan.meeting), plan.shard, plan.limit_s, kernels.device.type)
    decoder = _load(plan, kernels, group)
    kv = KVStore(decoder.config, plan.num_slots, plan.capacity, plan.scratch, kernels.dtype, kernels.device)
    group.wait_for_all()
    with torch.inference_mode():
        while len(words := group.receive()):
            order = decode(words)
            for move in order.moves:
                kv.move(move)
            decoder.forward(order.rows, kv, order.skip)


def _load(plan: RankPlan, kernels: Kernels, group: RankGroup) -> Decoder:
    weights = load_weights(plan.folder, plan.config, kernels.dtype, plan.shard)
    return Decoder(plan.shard.config(plan.config), weights, kernels, plan.capacity + plan.scratch, group)

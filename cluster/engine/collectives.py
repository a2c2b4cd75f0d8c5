"""How tensor-parallel ranks talk: sums and gathers inside a step, orders from rank 0 before it.

Two process groups a rank: orders always go over gloo on the CPU, where a rank with nothing to do sleeps as long as it
takes; tensors go over the group of their device, in which no rank waits for another beyond ``limit_s``. A sum gathers
all addends and adds them up in rank order: every rank gets the same bits, and a row's do not depend on how many rows
are summed with it, which no library's all-reduce promises. Ranks meet at an address of rank 0's, and listen on the
interface by which they reach it: the loopback one, unless they are on several machines.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F

from cluster.engine.orders import Words
from cluster.engine.shard import Shard

HEAD_WORDS = 512  # of an order: the length and its first words travel in one message, the rest in a second
MEETING_LIMIT_S = 300.0  # ranks have to be started: imports on a busy machine
JOIN_LIMIT_S = 30.0  # rank 0 listens before others are started
SETTLE_POLL_S, LOST_POLL_S = 50e-6, 0.1
MEETING_POLL_S = 0.02
IDLE = timedelta(days=365)  # an idle rank waits for its next order
LOOPBACK = "127.0.0.1"

Address = tuple[str, int]
"""A host's IP address, and a port."""
T = TypeVar("T")
dist: Any = torch.distributed  # its stubs know neither the stores nor the groups' options


class RankLost(Exception):
    """Another rank is gone, or took longer than the limit. Nothing can be computed with this group any more."""


def _gloo(store: Any, shard: Shard, limit: timedelta, host: str) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = limit
    options._threads = 1
    return dist.ProcessGroupGloo(store, shard.rank, shard.size, options)


def _nccl(store: Any, shard: Shard, limit: timedelta, host: str) -> Any:
    if host == LOOPBACK:  # nothing listens to the network
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = 2 * limit  # its watchdog ends the process: the last resort, behind ``settle``
    return dist.ProcessGroupNCCL(store, shard.rank, shard.size, options)


_BACKENDS = {"cpu": _gloo, "cuda": _nccl}


class Meeting:
    """Where the ranks of one target find each other: a store at ``address``, in rank 0's process."""

    def __init__(self, store: Any, address: Address) -> None:
        self.store = store
        self.address = address

    @classmethod
    def call(cls, host: str = LOOPBACK) -> Meeting:
        """Rank 0's. ``host``: the address at which the other ranks reach it. Over when this is let go."""
        listener = socket.create_server((host, 0))
        address = (host, listener.getsockname()[1])
        # A socket of our own making: the store would listen on every interface.
        fd = listener.detach()
        return cls(dist.TCPStore(*address, is_master=True, wait_for_workers=False, master_listen_fd=fd), address)

    @classmethod
    def join(cls, address: Address) -> Meeting:
        """The others'. Raises ``RankLost`` where rank 0 is not there."""
        limit = timedelta(seconds=JOIN_LIMIT_S)
        return cls(_sure(lambda: dist.TCPStore(*address, is_master=False, timeout=limit)), address)

    @property
    def own_host(self) -> str:
        """This machine's address on the way to rank 0."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(self.address)  # sends nothing
            return str(probe.getsockname()[0])


class RankGroup:
    """One rank's place among the others. Not thread-safe. Every method raises ``RankLost``."""

    def __init__(
        self, meeting: Meeting, shard: Shard, limit_s: float, device: str = "cpu", lost: Callable[[], str] = str
    ) -> None:
        """Meet the other ranks. ``lost`` says whether one of them is known to have ended."""
        self.shard = shard
        self._device = device
        self._lost = lost
        self._limit = timedelta(seconds=limit_s)
        self._meeting = meeting  # NCCL goes on asking its store
        self._meet()
        host = meeting.own_host

        def group(name: str, backend: Callable[..., Any], limit: timedelta) -> Any:
            return _sure(lambda: backend(dist.PrefixStore(name, meeting.store), shard, limit, host))

        self._orders = group("orders", _gloo, IDLE)
        self._tensors = group("tensors", _BACKENDS[device], self._limit)

    def sum(self, addend: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same bits on each; all ranks call it with the same shape and dtype."""
        parts = self._gather(addend)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def gather_columns(self, part: torch.Tensor, width: int) -> torch.Tensor:
        """(n, this rank's share of ``width``) -> (n, width) on rank 0, an empty tensor on the others."""
        widest = -(-width // self.shard.size)
        padded = F.pad(part, (0, widest - part.shape[1])).contiguous()
        outs = [torch.empty_like(padded) for _ in range(self.shard.size)] if self.shard.rank == 0 else []
        _sure(lambda: self._tensors.gather(outs, padded, 0).wait())
        shares = [Shard(rank, self.shard.size).share(width) for rank in range(len(outs))]
        kept = [out[:, : share.stop - share.start] for out, share in zip(outs, shares)]
        return torch.cat(kept, 1) if kept else part.new_empty(0)

    def settle(self) -> None:
        """Until a step is done. Over NCCL sums are only queued on the GPU: what is wrong with them shows here."""
        if self._device == "cuda":
            done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            wait_until(done.query, self._limit.total_seconds(), self._lost)

    def send(self, words: Words) -> None:
        """Rank 0: one order for all others. No words: stop."""
        message = np.concatenate(([len(words)], words))
        head = torch.zeros(HEAD_WORDS, dtype=torch.int64)
        head[: len(message)] = torch.from_numpy(message[:HEAD_WORDS])
        self._broadcast(head, self._limit)
        if len(message) > HEAD_WORDS:
            self._broadcast(torch.from_numpy(message[HEAD_WORDS:].copy()), self._limit)

    def receive(self) -> Words:
        """The others: rank 0's next order, however long it takes to come."""
        head = torch.empty(HEAD_WORDS, dtype=torch.int64)
        self._broadcast(head, IDLE)
        missing = int(head[0]) + 1 - HEAD_WORDS
        words = head.numpy()[1:]
        if missing > 0:
            rest = torch.empty(missing, dtype=torch.int64)
            self._broadcast(rest, self._limit)
            return np.concatenate((words, rest.numpy()))
        return words[: int(head[0])]

    def wait_for_all(self) -> None:
        """Until every rank has come here, however long it takes."""
        flags = [torch.empty(1) for _ in range(self.shard.size)]
        _sure(lambda: self._orders.allgather([flags], [torch.zeros(1)]).wait())

    def _meet(self) -> None:
        """Rank 0 waits for the others to check in and lets them go on; only then does anyone connect."""
        store = self._meeting.store
        if self.shard.rank:
            store.set(f"here/{self.shard.rank}", "")
            _sure(lambda: store.wait(["go"], timedelta(seconds=MEETING_LIMIT_S)))
            return
        names = [f"here/{rank}" for rank in range(1, self.shard.size)]
        deadline = time.monotonic() + MEETING_LIMIT_S
        while not store.check(names):
            if reason := self._lost():
                raise RankLost(reason)
            if time.monotonic() > deadline:
                raise RankLost(f"not all ranks were there after {MEETING_LIMIT_S:.0f} s")
            time.sleep(MEETING_POLL_S)
        store.set("go", "")

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.shard.size)]
        _sure(lambda: self._tensors.allgather([parts], [tensor]).wait())
        return parts

    def _broadcast(self, tensor: torch.Tensor, limit: timedelta) -> None:
        _sure(lambda: self._orders.broadcast(tensor, 0).wait(limit))


def wait_until(done: Callable[[], bool], limit_s: float, lost: Callable[[], str]) -> None:
    """Raises ``RankLost`` once ``lost`` says why, or where it takes longer than the limit."""
    start = asked = time.monotonic()
    while not done():
        now = time.monotonic()
        if now - start > limit_s:
            raise RankLost(f"a step is not done after {limit_s:g} s")
        if now - asked > LOST_POLL_S:
            asked = now
            if reason := lost():
                raise RankLost(reason)
        time.sleep(SETTLE_POLL_S)


def _sure(call: Callable[[], T]) -> T:
    try:
        return call()
    except RuntimeError as error:
        raise RankLost(str(error)) from error

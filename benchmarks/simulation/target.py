"""A target replica in virtual time: the real scheduler, governor and pipeline over a verifier that only takes time.

The token at output position e is e (see ``traces``), so that the target's answer to a tree follows from the tree.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from benchmarks.simulation.prices import DraftPrice, StepPrice
from benchmarks.simulation.trace_drafter import TraceDrafter
from benchmarks.simulation.traces import VOCAB_SIZE, WRONG, Trace
from benchmarks.simulation.virtual_time import Arrivals, EventLoop, Process
from cluster.core.accept import Accepted
from cluster.core.config import EngineConfig
from cluster.core.types import GenerateRequest, Origin, SamplingParams
from cluster.engine.verifier import Prefill, Verifier, Verify, VerifySpent
from cluster.rounds.calibration import emitted_path
from cluster.rounds.detokenize import TextStream
from cluster.rounds.gate import AskGate
from cluster.rounds.governor import RoundSpent, Shape
from cluster.rounds.pipeline import DraftTransport, Pipeline
from cluster.rounds.scheduler import Outcome, Scheduler
from cluster.rounds.session import Limits, Session

PROMPT_TOKEN = WRONG - 1


class SlotLedger:
    """Lengths of KV slots, as ``KVCache`` has them, and nothing in them."""

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots, self.capacity = num_slots, capacity
        self._free = list(range(num_slots))
        self._lengths = [0] * num_slots

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free_slots(self) -> tuple[int, ...]:
        return tuple(self._free)

    def allocate(self, slot: int, keep: int = 0) -> int:
        self._free.remove(slot)
        self._lengths[slot] = keep
        return slot

    def free(self, slot: int, keep: int = 0) -> None:
        self._free.append(slot)

    def length(self, slot: int) -> int:
        return self._lengths[slot]

    def grow(self, slot: int, positions: int) -> None:
        self._lengths[slot] += positions


class _Rank:
    """What a scheduler asks of the verifier's rank: its KV slots and its vocabulary."""

    def __init__(self, kv: SlotLedger) -> None:
        self.kv = kv
        self.config = self
        self.vocab_size = VOCAB_SIZE


class SimulatedVerifier:
    """Takes the place of ``Verifier``. ``entered``: when the last step began; ``spent``: what it took."""

    def __init__(
        self,
        price: StepPrice,
        kv: SlotLedger,
        sleep: Callable[[float], None],
        clock: Callable[[], float],
        seed: int,
    ) -> None:
        self.rank = _Rank(kv)
        self.entered = 0.0
        self.spent = VerifySpent(0.0, 0.0)
        self.seconds = 0.0
        self._price = price
        self._sleep = sleep
        self._clock = clock
        self._random = np.random.default_rng(seed)

    def step(self, prefills: Sequence[Prefill], verifies: Sequence[Verify]) -> tuple[list[Accepted], VerifySpent]:
        kv = self.rank.kv
        shape = shape_of(prefills, verifies, kv.length)
        self._sleep(self._price.choose(shape.sessions))
        self.entered = self._clock()
        forward = self._price.forward(shape)
        if self._price.noise:
            forward *= float(np.exp(self._price.noise * self._random.standard_normal()))
        self.spent = VerifySpent(forward, self._price.commit(shape))
        self.seconds += forward
        self._sleep(self.spent.forward + self.spent.accept)
        for chunk in prefills:
            kv.grow(chunk.slot, len(chunk.token_ids))
        blocks = [_accept(work) for work in verifies]
        for work, block in zip(verifies, blocks):
            kv.grow(work.slot, len(work.lead) + len(block.tokens))
        return blocks, self.spent


def shape_of(prefills: Sequence[Prefill], verifies: Sequence[Verify], length_of: Callable[[int], int]) -> Shape:
    """A step's rows by kind. Where no session decodes, the context is the prompts' at the end of this step."""
    decoding = [work for work in verifies if not work.lead]
    leads = [work for work in verifies if work.lead]
    prompt_rows = sum(len(chunk.token_ids) for chunk in prefills) + sum(len(work.lead) + 1 for work in leads)
    behind = [work.position for work in decoding or leads]
    behind = behind or [length_of(chunk.slot) + len(chunk.token_ids) for chunk in prefills]
    return Shape(
        len(decoding), sum(len(work.tree) for work in verifies), prompt_rows, sum(behind) / max(1, len(behind))
    )


def _accept(work: Verify) -> Accepted:
    first = 0 if work.root == PROMPT_TOKEN else work.root + 1
    nodes = tuple(emitted_path(work.tree, range(first, first + len(work.tree))))
    tokens = tuple(range(first, first + len(nodes) + 1))
    return Accepted(nodes, tokens, (np.inf,) * len(tokens))


class _PricedGate(AskGate):
    """Believes the simulated price of a call to the engine's own drafter, whatever this process took for it."""

    def __init__(self, price: DraftPrice) -> None:
        super().__init__()
        self._price = price

    def asked(self, sessions: int, seconds: float) -> None:
        super().asked(sessions, self._price.seconds(sessions, 0))


class SimulatedScheduler(Scheduler):
    """The scheduler, with rounds timed by the simulated clock."""

    _begun = 0.0

    def step(self) -> list[Outcome]:
        self._begun = self._clock()
        return super().step()

    def _account(self, mode: str, shape: Shape, spent: RoundSpent, outcomes: Sequence[Outcome]) -> None:
        verifier = cast(SimulatedVerifier, self._verifier)
        parts = verifier.spent
        spent = RoundSpent(verifier.entered - self._begun, parts.forward, parts.accept, self._clock() - self._begun)
        super()._account(mode, shape, spent, outcomes)


class SimulatedPipeline(Pipeline):
    """The pipeline of a target whose engine thread is ``process``: its waits take simulated time."""

    def __init__(self, process: Process, *parts: Any) -> None:
        super().__init__(*parts)
        self._arrived = cast(threading.Condition, Arrivals(process))


class _NoText:
    """A decoder of tokens that stand for no text."""

    def step(self, token: int) -> str:
        return ""


class SimulatedTarget:
    """One replica. ``emitted`` is told of every item: (session, number of tokens, whether it was the last)."""

    def __init__(
        self,
        loop: EventLoop,
        name: str,
        engine: EngineConfig,
        price: StepPrice,
        emitted: Callable[[Session, int, bool], None],
        local: tuple[Trace, DraftPrice] | None = None,
        remote: tuple[DraftTransport, Sequence[str]] | None = None,
        seed: int = 0,
    ) -> None:
        self.name = name
        self._loop = loop
        self._emitted = emitted
        engine = engine.model_copy(update={"prefix_reuse": False})  # simulated prompts are all alike
        self._limits = Limits(engine.max_model_len, frozenset())
        self._idle = False
        self._process = Process(loop, self._run, name)
        self.pipeline = None if remote is None else self._connect(*remote, engine)
        drafter = None
        if local is not None:
            trace, draft = local
            drafter = TraceDrafter(trace, Origin.SMALL, lambda trees: self._process.sleep(draft.seconds(trees, 0)))
        kv = SlotLedger(engine.kv_slots, engine.max_model_len)
        self.verifier = SimulatedVerifier(price, kv, self._process.sleep, loop.clock, seed)
        self.scheduler = SimulatedScheduler(
            engine, cast(Verifier, self.verifier), price.curve, drafter, self.pipeline, clock=loop.clock
        )
        if local is not None:
            self.scheduler.governor.gate = _PricedGate(local[1])

    def submit(self, request: GenerateRequest) -> Session:
        """Raises ``Overloaded`` as the service would. To be called by an event or from ``emitted``."""
        session = Session(request, self._limits, TextStream(_NoText()))
        self.scheduler.submit(session)
        if self._idle:
            self._process.wake()
        return session

    def stop(self) -> None:
        self._process.stop()

    def _connect(self, transport: DraftTransport, stages: Sequence[str], engine: EngineConfig) -> Pipeline:
        nodes, ahead = engine.max_nodes, engine.run_ahead_nodes
        return SimulatedPipeline(self._process, transport, stages, VOCAB_SIZE, nodes, self._loop.clock, ahead)

    def _run(self) -> None:
        while True:
            if self.scheduler.idle:
                self._idle = True
                self._process.wait()
                self._idle = False
            for outcome in self.scheduler.step():
                if outcome.error is not None:
                    raise outcome.error
                assert outcome.item is not None
                last = outcome.item.finish_reason is not None
                self._emitted(outcome.session, len(outcome.item.token_ids), last)


def request(name: str, seed: int, prompt_tokens: int, output_tokens: int) -> GenerateRequest:
    """Of so many tokens; ``seed`` names the session of each trace that it follows."""
    params = SamplingParams(temperature=0.0, seed=seed, max_tokens=output_tokens)
    return GenerateRequest(name, (PROMPT_TOKEN,) * prompt_tokens, params)

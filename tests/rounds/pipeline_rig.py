"""A pipeline over workers in this process that can be slow or lie, and a session to ask about."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from fakes import InProcessTransport, ScriptedDrafter

from cluster.core.token_tree import TokenTree
from cluster.core.types import GenerateRequest, Origin, SamplingParams
from cluster.rounds.detokenize import TextStream
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.messages import DraftAsk, DraftReply
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.session import Limits, Session
from drafters.base import Ask

VOCAB = 1000
PATIENCE_S = 5.0  # longer than any reply takes; waiting ends when the reply is there


class SilentDecoder:
    def step(self, token: int) -> str:
        return ""


def session(name: str = "s", prompt: int = 4) -> Session:
    request = GenerateRequest(name, tuple(range(prompt)), SamplingParams(max_tokens=500))
    return Session(request, Limits(10_000, frozenset()), TextStream(SilentDecoder()))


def next_token(tokens: list[int], ask: Ask) -> TokenTree:
    """A tree that tells which state it was made for."""
    return TokenTree.chain([len(tokens)], stage=Origin.SMALL)


def medium_of(tokens: list[int], ask: Ask) -> TokenTree:
    return TokenTree.chain([len(tokens)], stage=Origin.MEDIUM)


def slow(make: Callable[[list[int], Ask], TokenTree], seconds: float) -> Callable[[list[int], Ask], TokenTree]:
    def later(tokens: list[int], ask: Ask) -> TokenTree:
        time.sleep(seconds)
        return make(tokens, ask)

    return later


class LyingWorker(DraftWorker):
    """Sends the same tokens as every tree, whatever its drafter says."""

    def __init__(self, honest: DraftWorker, tokens: list[int]) -> None:
        self._honest, self._tokens = honest, tokens

    def draft(self, verifier: str, asks: Sequence[DraftAsk], upstream: DraftReply | None = None) -> DraftReply:
        reply = self._honest.draft(verifier, asks, upstream)
        lies = {name: TokenTree.chain(self._tokens, 1, tree.key) for name, tree in reply.trees.items()}
        return replace(reply, trees=lies)


class Rig:
    """A pipeline with one worker per stage, and a session that is ready to be asked about."""

    def __init__(self, stages: tuple[str, ...] = ("small", "medium")) -> None:
        makers = {"small": next_token, "medium": medium_of}
        self.drafters = {stage: ScriptedDrafter(makers[stage], vocab_size=VOCAB) for stage in stages}
        self.transport = InProcessTransport({stage: DraftWorker(stage, self.drafters[stage]) for stage in stages})
        self.now = 0.0
        self.pipeline = Pipeline(self.transport, stages, VOCAB, 16, clock=lambda: self.now + time.monotonic())
        self.session = session()
        self.pipeline.open(self.session, stages)
        self.ask()
        self.transport.join()

    def ask(self) -> None:
        self.pipeline.ask([(self.session, self.pipeline.stages, 8)])

    def commit(self, *tokens: int) -> None:
        self.session.advance(tokens, [Origin.TARGET] * len(tokens), 0)

    def round(self, timeout_s: float = PATIENCE_S) -> TokenTree | None:
        """Commit a token, ask, collect."""
        self.commit(7)
        self.ask()
        return self.pipeline.collect([self.session], timeout_s).get(self.session.id)


def stages_of(tree: TokenTree | None) -> list[int] | None:
    return None if tree is None else tree.stages.tolist()


def long_chain(tokens: list[int], ask: Ask) -> TokenTree:
    """What ``commit(7)`` will bring for many rounds."""
    return TokenTree.chain([7] * min(ask.max_nodes, ask.max_depth), stage=Origin.SMALL)


def ahead_rig(make: Callable[[list[int], Ask], TokenTree], run_ahead: int) -> Rig:
    rig = Rig(("small",))
    rig.drafters["small"].make = make
    rig.pipeline = Pipeline(
        rig.transport, ("small",), VOCAB, 16, clock=lambda: rig.now + time.monotonic(), run_ahead=run_ahead
    )
    rig.pipeline.open(rig.session, ("small",))
    rig.ask()
    rig.transport.join()
    rig.ask()
    assert rig.pipeline.collect([rig.session], PATIENCE_S)
    return rig

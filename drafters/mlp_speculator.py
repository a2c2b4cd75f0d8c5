"""MLP speculator: a small network guesses on from the target's hidden state (after arXiv 2404.19124).

Idea: where the target decided a session's newest token, its last hidden state holds more about what comes next than any
text does. A few residual MLP blocks turn that state and the newest token into the state behind it, a cut head says what
follows, and so on, token by token: no attention, so no K/V, nothing to prefill and nothing to roll back. Colocated, as
the states are the target's. Cost: a pass reads about 8 % of what a step of a 135M target reads; the first stage's
guesses are scored in the first pass, level by level, as in staged speculation (``growth.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cluster.core.errors import ConfigError
from cluster.core.token_tree import TokenTree
from cluster.core.types import Origin
from cluster.engine.kernels import MlpForward
from cluster.engine.packed import PackedBlock, PackedMlpHead
from cluster.engine.rank import Rank
from cluster.engine.weights import output_rows
from drafters.base import Ask
from drafters.draft_model import usable
from drafters.expand import Float64Array, Int64Array, Place, expand
from drafters.follower import Followed, Follower
from drafters.growth import ROOT, Growth
from drafters.mlp_head import load_head
from drafters.options import MlpOptions


@dataclass(slots=True)
class _Plot:
    """One session's tree while it grows. ``before``: the state that decided the root; ``states``: behind each
    evaluated node, the root included."""

    session: Followed
    growth: Growth
    before: torch.Tensor
    states: dict[int, torch.Tensor] = field(default_factory=dict)


class MlpSpeculator(Follower):
    """Drafts for many sessions on one rank's hidden states.

    slot_of: session id -> the target's slot, None where it has none. head: see ``load_mlp``.
    """

    def __init__(
        self,
        rank: Rank,
        slot_of: Callable[[str], int | None],
        head: tuple[MlpForward, torch.Tensor],
        options: MlpOptions,
        *,
        stage: Origin = Origin.MEDIUM,
    ) -> None:
        super().__init__()
        if rank.tips is None:
            rank.tips = {}
        self.stage = stage
        self.vocab_size: int | None = rank.config.vocab_size
        self._vocab_size = rank.config.vocab_size
        self._tips = rank.tips
        self._slot_of = slot_of
        self._forward = head[0]
        self._columns = head[1].numpy()
        self._options = options

    @torch.inference_mode()
    def propose(self, asks: Sequence[Ask], upstream: Mapping[str, TokenTree]) -> dict[str, TokenTree]:
        plots: dict[str, _Plot] = {}
        for ask in asks:
            session = self._session(ask.session_id)
            state = self._state(ask.session_id, session)
            if state is not None:
                hints = usable(upstream.get(ask.session_id), self._vocab_size)
                growth = Growth(ask.max_nodes, ask.max_depth, hints, self._options, self.stage, ask.min_score)
                plots[ask.session_id] = _Plot(session, growth, state)
        if plots:
            self._grow(list(plots.values()))
        trees = {session_id: plot.growth.tree() for session_id, plot in plots.items()}
        return {session_id: tree for session_id, tree in trees.items() if len(tree)}

    def _state(self, session_id: str, session: Followed) -> torch.Tensor | None:
        """What decided the session's newest token; None before the target has decided one in its present slot."""
        slot = self._slot_of(session_id)
        tip = None if slot is None else self._tips.get(slot)
        return tip.features if tip is not None and tip.length == len(session.tokens) else None

    def _grow(self, plots: Sequence[_Plot]) -> None:
        """At most ``passes`` passes, each over all plots that still want one; the first evaluates the roots."""
        for number in range(self._options.passes):
            work = [(plot, plot.growth.next_nodes()) for plot in plots]
            if number == 0:
                work = [(plot, [ROOT, *nodes]) for plot, nodes in work]
            work = [(plot, nodes) for plot, nodes in work if nodes]
            if not work:
                return
            self._evaluate(work)

    def _evaluate(self, work: Sequence[tuple[_Plot, list[int]]]) -> None:
        """The states of all nodes, a level at a time, then what follows each, in one go."""
        nodes = [(plot, node) for plot, chosen in work for node in chosen]
        waiting = nodes
        while waiting:
            ready = [(plot, node) for plot, node in waiting if node == ROOT or plot.growth.parent(node) in plot.states]
            self._advance(ready)
            waiting = [(plot, node) for plot, node in waiting if node not in plot.states]
        logits = self._forward.logits(torch.stack([plot.states[node] for plot, node in nodes]))
        places = []
        for plot, node in nodes:
            session, path = plot.session, plot.growth.path(node)
            places.append(Place(session.params, len(session.tokens) + len(path), session.history, path))
        tokens, probs = self._children(logits, places)
        for row, (plot, node) in enumerate(nodes):
            plot.growth.expand(node, tokens[row], probs[row])

    def _children(self, logits: torch.Tensor, places: Sequence[Place]) -> tuple[Int64Array, Float64Array]:
        """See ``expand``. What a session adds to logits it adds by token id: its rows are spread over all of them."""
        if not any(place.params.logit_bias or place.params.has_penalties for place in places):
            return expand(logits.numpy(), places, self._options.error_scale, self._columns)
        whole = logits.new_full((len(logits), self._vocab_size), -torch.inf)
        whole[:, self._columns] = logits
        return expand(whole.numpy(), places, self._options.error_scale)

    def _advance(self, nodes: Sequence[tuple[_Plot, int]]) -> None:
        tokens = [plot.session.tokens[-1] if node == ROOT else plot.growth.tokens[node] for plot, node in nodes]
        before = [plot.before if node == ROOT else plot.states[plot.growth.parent(node)] for plot, node in nodes]
        states = self._forward.advance(torch.tensor(tokens), torch.stack(before))
        for (plot, node), state in zip(nodes, states):
            plot.states[node] = state
            plot.growth.rows[node] = len(plot.growth.rows)


def load_mlp(folder: Path, target: Path, rank: Rank) -> tuple[MlpForward, torch.Tensor]:
    """The network in ``folder`` on the kernels of ``rank``, and the ids its head knows, (n,) int64 rising.

    Raises ``ConfigError`` where it is not the target's, its tensors do not fit together, or the target is sharded: its
    ranks keep hidden states apart.
    """
    model = rank.decoder.model
    if model is None:
        raise ConfigError("drafter: mlp_speculator needs a target of one rank; allowed: tensor_parallel_size 1")
    kernels = rank.decoder.kernels
    header, tensors = load_head(folder, target, rank.config.hidden_size)

    def tensor(name: str) -> torch.Tensor:
        return kernels.place(tensors[f"{name}.weight"].to(kernels.dtype))

    blocks = [
        PackedBlock(
            tensor(f"blocks.{index}.norm"),
            kernels.pack_gated(tensor(f"blocks.{index}.gate"), tensor(f"blocks.{index}.up")),
            kernels.pack(tensor(f"blocks.{index}.down")),
        )
        for index in range(header.blocks)
    ]
    head_tokens, vocab_size = tensors["head_tokens"].long(), rank.config.vocab_size
    if head_tokens.dim() != 1 or not ((head_tokens >= 0) & (head_tokens < vocab_size)).all():
        raise ConfigError(f"head: {folder} knows tokens beyond the target's; allowed: ids from 0 to {vocab_size - 1}")
    packed = PackedMlpHead(
        embedding=model.embedding,
        state_norm=tensor("state_norm"),
        token_norm=tensor("token_norm"),
        mix=kernels.pack(tensor("mix")),
        blocks=tuple(blocks),
        final_norm=tensor("final_norm"),
        head=kernels.pack(output_rows(target, rank.config, head_tokens).to(kernels.dtype), wide=True),
        eps=header.eps,
    )
    return kernels.mlp_of(packed), head_tokens

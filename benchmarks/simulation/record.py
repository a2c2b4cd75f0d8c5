"""Acceptance traces: a drafter is asked at every position of recorded outputs, and told the true next token."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import offline
from benchmarks.simulation.traces import Offer, SessionTrace, Trace
from cluster.core.token_tree import TokenTree
from cluster.core.types import SamplingParams
from cluster.engine.weights import read_config, resolve_model
from cluster.rounds.calibration import emitted_path
from drafters import TargetFacts, create
from drafters.base import Ask, Drafter
from drafters.datastore import open_store
from drafters.shipped_store import find_store

MAX_DEPTH = 32
SESSION = "record"


def record(answers: Sequence[Mapping[str, Any]], drafter: Drafter, nodes: int, source: Mapping[str, Any]) -> Trace:
    """The trace of ``drafter`` over ``answers``, each with ``prompt_token_ids`` and ``token_ids``.

    These are lines of ``benchmarks.offline --out`` at temperature 0. The drafter is asked for ``nodes`` nodes.
    """
    sessions = []
    for number, answer in enumerate(answers, 1):
        sessions.append(_follow(answer["prompt_token_ids"], answer["token_ids"], drafter, nodes))
        print(f"\r{number}/{len(answers)} outputs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return Trace(tuple(sessions), dict(source))


def drafter_for(name: str, model: str) -> Drafter:
    """The drafter as ``benchmarks.offline --drafters`` names it, with weights of its own. Raises ``ConfigError``."""
    args = offline.parse_args([f"--drafters={name}", f"--model={model}", "--prompts=-"])
    stage = offline.drafter_stage(args)
    assert stage is not None
    folder = resolve_model(model)
    facts = TargetFacts(read_config(folder).vocab_size, args.max_model_len, folder, args.dtype)
    store = find_store("default", facts.vocab_size, folder)
    if store is not None:
        open_store(store)  # its index is made now, if it is not there yet
    return create(stage, target=facts)


def _follow(prompt: Sequence[int], output: Sequence[int], drafter: Drafter, nodes: int) -> SessionTrace:
    drafter.begin(SESSION, [*prompt, *output[:1]], SamplingParams(), len(prompt))
    offers = [Offer.of(TokenTree.empty(), ())]
    for position in range(1, len(output)):
        tree = drafter.propose([Ask(SESSION, nodes, MAX_DEPTH)], {}).get(SESSION, TokenTree.empty())
        offers.append(Offer.of(tree, emitted_path(tree, output[position:])))
        drafter.commit(SESSION, output[position : position + 1])
    drafter.end(SESSION)
    return SessionTrace(len(prompt), offers[: len(output)])

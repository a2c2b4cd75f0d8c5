"""What a session leaves behind: the whole of its text, and for its owner alone, in process and over the messages."""

from __future__ import annotations

import pytest
from exactness_rig import GREEDY, Rig, requests
from fakes import InProcessTransport, ScriptedDrafter, empty
from tiny import VOCAB, save_tiny_llama

from cluster.core.types import GenerateRequest
from cluster.rounds.draft_worker import DraftWorker
from cluster.rounds.pipeline import Pipeline
from cluster.rounds.session import Session
from drafters.live_store import LiveStores
from drafters.options import SssdOptions
from drafters.sssd import PROMPT_TAIL, SssdDrafter


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return Rig(save_tiny_llama(tmp_path_factory.mktemp("target")), "float32")


def ask(owner: str) -> GenerateRequest:
    return GenerateRequest("r", requests(GREEDY)[0].prompt_token_ids, GREEDY, owner=owner)


def test_a_drafter_in_process_learns_the_owner_and_the_text_to_its_end(target: Rig) -> None:
    drafter = ScriptedDrafter(empty)
    session = target.run([ask("me")], drafter)["r"]
    assert drafter.owners == {session.id: "me"}
    assert drafter.ended == [session.tokens]


def test_a_draft_worker_learns_the_owner(target: Rig) -> None:
    drafter = ScriptedDrafter(empty)
    transport = InProcessTransport({"small": DraftWorker("small", drafter)})
    session = target.run([ask("me")], None, Pipeline(transport, ("small",), VOCAB, 12))["r"]
    transport.join()
    assert drafter.owners == {f"test/{session.id}": "me"}


def test_live_text_drafts_for_its_owner_alone_and_changes_no_token(target: Rig) -> None:
    live = LiveStores(VOCAB, min_new=1)
    drafter = SssdDrafter(SssdOptions(), live=live)

    def run(owner: str) -> Session:
        session = target.run([ask(owner)], drafter)["r"]
        live.wait()
        return session

    first, again, other, nobody = (run(owner) for owner in ("me", "me", "you", ""))
    assert again.stats.accepted > first.stats.accepted
    assert other.stats.accepted == nobody.stats.accepted == first.stats.accepted
    assert again.tokens == other.tokens == nobody.tokens == first.tokens
    store = live.of("you")
    assert store is not None
    assert store.text.tolist() == [*other.tokens[other.prompt_len - PROMPT_TAIL :], VOCAB]

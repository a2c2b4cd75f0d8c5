"""Several ranks compute what one does; a rank that is lost fails the target at once and says which it was."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_steps import TREE_PARENTS, chain, path_to, prefill, random_tokens, rows
from thread_crew import ThreadCrew

from cluster.core.errors import EngineDied
from cluster.engine import collectives, crew
from cluster.engine.collectives import LOOPBACK, Meeting, RankLost, wait_until
from cluster.engine.crew import LocalCrew
from cluster.engine.rank import Rank
from cluster.engine.tensor_parallel import RankPlan, Recruit, ShardedRank, build_sharded_rank

PROMPT = random_tokens(40, 101)
TREE = random_tokens(7, 101, seed=1)
SKIP = frozenset({2, 3})
Build = Callable[..., ShardedRank]


@pytest.fixture
def build() -> Iterator[Build]:
    """(folder, dtype, size, kernels) -> rank 0; closed in the end."""
    made: list[ShardedRank] = []

    def build(
        folder: Path,
        dtype: str,
        size: int,
        kernels: str = "auto",
        recruit: Recruit = ThreadCrew,
        limit_s: float = 60.0,
        scratch: int = 64,
        host: str = LOOPBACK,
    ) -> ShardedRank:
        sizes = {"num_slots": 3, "capacity": 96, "scratch": scratch, "threads": 1}
        limits = {"limit_s": limit_s, "host": host}
        made.append(build_sharded_rank(folder, dtype, size, recruit, kernels=kernels, **limits, **sizes))
        return made[-1]

    yield build
    for rank in made:
        rank.close()


def a_sessions_steps(rank: Rank) -> list[torch.Tensor]:
    """Logits of a prompt in chunks, a tree, a commit that moves rows, a skipped pass, and a prefix taken over."""
    slot = prefill(rank, PROMPT, chunk=13)
    found = [rank.forward([rows(slot, TREE, TREE_PARENTS)])]
    found.append(rank.forward([rows(slot, TREE, TREE_PARENTS)], SKIP))
    rank.forward([rows(slot, TREE, TREE_PARENTS)])
    rank.kv.commit(slot, path_to(5))
    other = rank.kv.allocate()
    rank.kv.copy(slot, other, len(PROMPT) + 2)
    found.append(rank.forward([chain(other, TREE[:3], logits=False), chain(slot, TREE[:1])]))
    found.append(rank.forward([chain(other, TREE[:3])]))
    rank.kv.free(slot)
    rank.kv.free(other)
    return found


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {})],
)
def test_several_ranks_give_one_ranks_logits(make_model, make_rank, build: Build, family, changes, size) -> None:  # type: ignore[no-untyped-def]
    kv_heads = 1 if size == 3 else 2
    _, folder = make_model(family, num_key_value_heads=kv_heads, **changes)
    expected = a_sessions_steps(make_rank(folder, "float64"))
    for logits, wanted in zip(a_sessions_steps(build(folder, "float64", size)), expected, strict=True):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6)


def test_ranks_that_compute_in_triton_give_one_ranks_logits(make_model, make_rank, build: Build) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("triton")
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("NCCL wants a GPU for each rank")
    folder = make_model("llama", num_hidden_layers=1)[1]
    # In processes of their own: Triton's interpreter is not for threads.
    ranks = build(folder, "float32", 2, "triton", LocalCrew, scratch=8), make_rank(folder, "float32", "torch")
    found, wanted = (rank.forward([rows(prefill(rank, PROMPT[:9], chunk=8), TREE, TREE_PARENTS)]) for rank in ranks)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.3)])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_rows_are_bit_equal_however_many_there_are(
    make_model, make_rank, build: Build, dtype, tolerance, kernels
) -> None:  # type: ignore[no-untyped-def]
    _, folder = make_model("llama")
    rank = build(folder, dtype, 2, kernels)
    assert rank.kernels == make_rank(folder, dtype, kernels).kernels
    assert rank.row_invariant
    slot = prefill(rank, PROMPT)
    together = rank.forward([rows(slot, TREE, TREE_PARENTS)])
    for row in range(len(TREE)):
        alone = rank.forward([chain(slot, [TREE[at] for at in path_to(row)])])
        assert torch.equal(alone[-1], together[row])
    rank.kv.free(slot)
    for logits, wanted in zip(a_sessions_steps(rank), a_sessions_steps(make_rank(folder, dtype, kernels))):
        torch.testing.assert_close(logits, wanted, rtol=0.0, atol=tolerance)


def test_ranks_elsewhere_are_told_where_rank_0_is(make_model, make_rank, build: Build) -> None:  # type: ignore[no-untyped-def]
    told: list[RankPlan] = []

    def recruit(plans: Sequence[RankPlan]) -> ThreadCrew:
        told.extend(plans)
        return ThreadCrew(plans)

    folder = make_model("llama")[1]
    rank = build(folder, "float64", 2, recruit=recruit, host="127.0.0.2")
    assert [plan.meeting[0] for plan in told] == ["127.0.0.2"]
    for logits, wanted in zip(a_sessions_steps(rank), a_sessions_steps(make_rank(folder, "float64")), strict=True):
        torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6)


def test_a_rank_that_finds_nobody_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "JOIN_LIMIT_S", 0.5)
    with pytest.raises(RankLost):
        Meeting.join(("127.0.0.1", 1))


def test_a_step_that_is_not_done_ends_with_what_the_crew_knows_or_at_the_limit() -> None:
    wait_until(iter([False, True]).__next__, 1.0, str)
    start = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 died"):
        wait_until(lambda: False, 60.0, lambda: "rank 1 died")
    assert time.monotonic() - start < 30.0
    with pytest.raises(RankLost, match=r"not done after 0\.02 s"):
        wait_until(lambda: False, 0.02, str)


def test_a_step_refused_on_rank_0_leaves_the_others_in_step(make_model, build: Build) -> None:  # type: ignore[no-untyped-def]
    rank = build(make_model("llama")[1], "float64", 2)
    expected = a_sessions_steps(rank)
    slot = rank.kv.allocate()
    with pytest.raises(ValueError, match="token id"):
        rank.forward([chain(slot, [101])])
    rank.kv.free(slot)
    assert all(map(torch.equal, a_sessions_steps(rank), expected))


def crew_pids(rank: ShardedRank) -> dict[str, int]:
    return dict(rank.crew.pids)


def test_a_killed_rank_is_noticed_between_steps_and_fails_the_next_one(make_model, make_rank, build: Build) -> None:  # type: ignore[no-untyped-def]
    _, folder = make_model("llama", num_key_value_heads=1)
    rank = build(folder, "float64", 3, recruit=LocalCrew)
    for logits, wanted in zip(a_sessions_steps(rank), a_sessions_steps(make_rank(folder, "float64"))):
        torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6)
    rank.kv.check()
    slot = prefill(rank, PROMPT)
    os.kill(crew_pids(rank)["rank 2"], signal.SIGKILL)
    with pytest.raises(EngineDied, match=r"rank 2 \(pid \d+\) ended with exit code -9"):
        rank.forward([chain(slot, TREE)])
    with pytest.raises(EngineDied, match="rank 2"):
        rank.kv.check()
    with pytest.raises(EngineDied, match="rank 2"):
        rank.forward([chain(slot, TREE)])


def test_a_hung_rank_fails_the_step_within_its_limit(  # type: ignore[no-untyped-def]
    make_model, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "CLOSE_LIMIT_S", 1.0)
    limit_s = 4.0
    rank = build(make_model("llama")[1], "float64", 2, recruit=LocalCrew, limit_s=limit_s)
    slot = prefill(rank, PROMPT)
    os.kill(crew_pids(rank)["rank 1"], signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(EngineDied, match="does not answer"):
        rank.forward([chain(slot, TREE)])
    assert time.monotonic() - start >= limit_s
    rank.close()


def test_ranks_end_by_themselves_when_told_to(make_model, build: Build) -> None:  # type: ignore[no-untyped-def]
    rank = build(make_model("llama")[1], "float64", 2, recruit=LocalCrew)
    rank.close()
    assert "exit code 0" in rank.crew.failure()


def test_a_rank_that_cannot_load_is_named_when_the_target_starts(make_model, build: Build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def astray(plans: Sequence[RankPlan]) -> LocalCrew:
        return LocalCrew([replace(plan, folder=tmp_path) for plan in plans])

    with pytest.raises(EngineDied, match=r"rank 1 .* ended with exit code 1"):
        build(make_model("llama")[1], "float64", 2, recruit=astray)

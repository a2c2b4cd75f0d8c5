"""The search for the sub-layers to leave out: on planted problems, on a tiny model, and in a scheduler's idle time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import GREEDY, SAMPLED, CountingRank, chain, continuation, random_tokens, tiny_rank

from cluster.core.errors import ConfigError
from cluster.core.types import SamplingParams
from drafters.matchness import Window, score
from drafters.options import SwiftOptions
from drafters.shipped import ARTIFACTS
from drafters.skip_proposals import ProposerName, Score, SkipSet, SkipSpace, make_proposer
from drafters.skip_search import LEVEL_TOKENS, PATIENCE, TRIES, SkipSearch
from drafters.skip_sets import find_set, write_set
from drafters.swift import SwiftDrafter, uniform_skip

SPACE = SkipSpace(num_layers=10, count=5)
BEST = frozenset({2, 5, 8, 11, 14})
ROWS = 64


class Planted:
    """Texts on which every sub-layer left out beyond ``BEST`` costs 12 points of matchness, of 90 at best."""

    def __init__(self, seed: int, best: SkipSet = BEST) -> None:
        self.best = best
        self._rng = np.random.default_rng(seed)

    def chance(self, skip: SkipSet) -> float:
        return 0.9 - 0.12 * len(skip - self.best)

    def window(self) -> Callable[[SkipSet], np.ndarray]:
        """A stretch of text: tokens that are hard are hard for every set, but not equally."""
        hard = self._rng.random(ROWS)
        seed = int(self._rng.integers(1 << 30))

        def hits(skip: SkipSet) -> np.ndarray:
            own = np.random.default_rng([seed, *sorted(skip)]).random(ROWS)
            return np.asarray(0.7 * hard + 0.3 * own < self.chance(skip))

        return hits


def run(search: SkipSearch, texts: Planted, windows: int) -> int:
    """Returns how many scores it took until the best set was the incumbent, or all of them."""
    scored, found = 0, None
    for _ in range(windows):
        hits = texts.window()
        search.open()
        while (skip := search.ask()) is not None:
            search.tell(hits(skip))
            scored += 1
        if found is None and search.incumbent == texts.best:
            found = scored
    return found or scored


def searching(name: ProposerName = "mutate", seed: int = 0, start: SkipSet | None = None) -> SkipSearch:
    start = uniform_skip(SPACE.num_layers, SPACE.count) if start is None else start
    return SkipSearch(SPACE, make_proposer(name, SPACE, seed), start)


def test_mutations_find_a_planted_set_sooner_than_random_sets_do() -> None:
    costs: dict[ProposerName, list[int]] = {"mutate": [], "random": []}
    for name, found in costs.items():
        found += [run(searching(name, seed), Planted(seed), 120) for seed in range(6)]
    assert np.mean(costs["mutate"]) < 0.7 * np.mean(costs["random"])


@pytest.mark.parametrize("name", ["mutate", "random"])
def test_a_search_ends_far_better_than_it_began(name: ProposerName) -> None:
    search, texts = searching(name), Planted(3)
    before = texts.chance(search.incumbent)
    run(search, texts, 60)
    assert texts.chance(search.incumbent) >= before + 0.12


def test_bayesian_proposals_are_better_than_random_ones_once_there_are_scores() -> None:
    texts, draw = Planted(0), random.Random(0)
    tried = [frozenset(draw.sample(SPACE.units, SPACE.count)) for _ in range(80)]
    scores = [Score(skip, texts.chance(skip)) for skip in tried]
    proposer = make_proposer("bayes", SPACE)
    proposed = [proposer.propose(tried[0], scores, 81 + at) for at in range(6)]
    assert np.mean(list(map(texts.chance, proposed))) > np.mean(list(map(texts.chance, tried))) + 0.12


@pytest.mark.parametrize("name", ["mutate", "random", "bayes"])
def test_proposals_leave_out_as_many_sub_layers_as_asked_and_never_the_first_or_last_layer(name: ProposerName) -> None:
    search, texts, seen = searching(name), Planted(1), set[SkipSet]()
    for _ in range(6):
        hits = texts.window()
        search.open()
        while (skip := search.ask()) is not None:
            seen.add(skip)
            search.tell(hits(skip))
    assert len(seen) > 6
    assert {len(skip) for skip in seen} == {5}
    assert {unit for skip in seen for unit in skip} <= set(range(2, 18))


@pytest.mark.parametrize("name", ["mutate", "random", "bayes"])
def test_a_search_is_the_same_under_the_same_seed_and_goes_on_from_its_state(name: ProposerName) -> None:
    def trace(search: SkipSearch, texts: Planted, windows: int) -> list[SkipSet]:
        seen = []
        for _ in range(windows):
            hits = texts.window()
            search.open()
            while (skip := search.ask()) is not None:
                seen.append(skip)
                search.tell(hits(skip))
        return seen

    windows = 3 if name == "bayes" else 8  # an estimator is fitted for each of its proposals
    whole = trace(searching(name), Planted(2), windows)
    assert trace(searching(name), Planted(2), windows) == whole
    assert trace(searching(name, seed=1), Planted(2), windows) != whole
    search, texts = searching(name), Planted(2)
    first = trace(search, texts, windows // 2)
    state = json.loads(json.dumps(search.state()))
    restored = SkipSearch.restore(SPACE, make_proposer(name, SPACE, 0), state)
    assert restored.state() == state
    rest, restored_rest = trace(search, Planted(5), 2), trace(restored, Planted(5), 2)
    assert first == whole[: len(first)]
    # Whatever duel was under way is fought anew; before its end no new set is proposed by either.
    assert restored_rest[0] == rest[0] == search_start(state)


def search_start(state: dict[str, list[int]]) -> SkipSet:
    return frozenset(state["skip"])


def test_a_state_of_another_space_is_refused() -> None:
    other = SkipSpace(10, 4)
    with pytest.raises(ConfigError, match="5 sub-layers of 10 layers"):
        SkipSearch.restore(other, make_proposer("mutate", other), searching().state())


def test_a_lucky_first_score_makes_no_incumbent() -> None:
    """A set that shone on one window, and is worse on all others, is a challenger and no more."""
    search = searching(start=BEST)
    half = np.arange(ROWS) % 2 == 0
    search.open()
    assert search.ask() == BEST
    search.tell(half)
    lucky = search.ask()
    assert lucky is not None
    assert lucky != BEST
    search.tell(np.ones(ROWS, np.bool_))
    assert search.ask() is None  # it has to show itself on fresh windows
    for _ in range(2):
        search.open()
        assert search.ask() == BEST
        search.tell(half)
        assert search.ask() == lucky
        search.tell(half & (np.arange(ROWS) > 8))
        assert search.ask() != lucky
    assert search.incumbent == BEST
    assert search.adopted == 0


def test_the_incumbent_is_scored_anew_on_every_window_and_a_tie_keeps_it() -> None:
    search, level = searching(start=BEST), np.arange(ROWS) < 48
    for window in range(1, 4):
        search.open()
        for _ in range(1 + TRIES):
            assert search.ask() is not None
            search.tell(level)
        assert search.ask() is None
        assert search.matchness == 0.75
        assert search.trials == window * TRIES
    assert search.incumbent == BEST


def test_nothing_is_told_that_was_not_asked() -> None:
    with pytest.raises(ValueError, match="no set was asked"):
        searching().tell(np.ones(4, np.bool_))


def test_a_search_rests_after_long_failure_and_wakes_when_the_text_changes() -> None:
    search, first = searching(start=BEST), Planted(0)
    while not search.resting:
        run(search, first, 1)
    assert search.trials >= PATIENCE
    assert search.incumbent == BEST
    trials = search.trials
    run(search, first, 40)
    assert search.trials == trials  # the incumbent alone is scored: that is the watch for a change
    other = Planted(0, best=frozenset({3, 6, 9, 12, 15}))
    run(search, other, 12)
    assert not search.resting
    run(search, other, 200)
    assert other.chance(search.incumbent) > other.chance(BEST) + 0.3


def test_when_the_text_changes_what_served_before_is_tried_first() -> None:
    before = frozenset({3, 6, 9, 12, 15})
    proposer = make_proposer("mutate", SPACE)
    search = SkipSearch(SPACE, proposer, BEST, library=[before])
    first = Planted(0)
    while not search.resting:
        run(search, first, 1)
    back = Planted(1, best=before)
    scored = run(search, back, 12)
    assert search.incumbent == before
    assert scored < 60
    state = search.state()
    assert sorted(BEST) in state["library"]


def test_counts_and_layers_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[0, 16\]"):
        SkipSpace(10, 17)
    with pytest.raises(ConfigError, match="inner sub-layers"):
        SkipSearch(SPACE, make_proposer("mutate", SPACE), frozenset({0, 2, 3, 4, 5}))
    assert LEVEL_TOKENS > ROWS


# --- scores on a model


def filled(rank: CountingRank, text: list[int]) -> int:
    slot = rank.kv.allocate()
    rank.forward([chain(slot, text[:-1], logits=False)])
    rank.kv.commit(slot, range(len(text) - 1))
    return slot


def test_one_pass_scores_what_drafting_from_each_position_would_guess() -> None:
    rank, skip = tiny_rank(), frozenset({2, 5})
    texts = [random_tokens(0, 40), random_tokens(1, 30)]
    slots = [filled(rank, text) for text in texts]
    windows = [
        Window(slots[0], 20, np.asarray(texts[0][20:37], np.int32), GREEDY),
        Window(slots[1], 5, np.asarray(texts[1][5:30], np.int32), GREEDY),
    ]
    got = score(rank, windows, skip)
    expected = []
    for text, window in zip(texts, windows):
        for at in range(window.first, window.first + len(window)):
            alone = tiny_rank()
            slot = filled(alone, text[: at + 1])
            row = alone.forward([chain(slot, [text[at]])], skip)[-1]
            expected.append(int(row.argmax()) == text[at + 1])
    assert got.tolist() == expected


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_skipping_nothing_guesses_every_token_the_target_said(params: SamplingParams) -> None:
    rank, prompt = tiny_rank(), random_tokens(0, 12)
    text = prompt + continuation(tiny_rank(), prompt, params, 12)
    slot = filled(rank, text)
    window = Window(slot, 11, np.asarray(text[11:], np.int32), params)
    assert score(rank, [window], frozenset()).tolist() == [True] * 12


def test_scoring_writes_behind_the_capacity_alone() -> None:
    rank, text = tiny_rank(), random_tokens(2, 30)
    slot = filled(rank, text)
    kept = [store[:, : rank.kv.capacity].clone() for store in (*rank.kv.keys, *rank.kv.values)]
    score(rank, [Window(slot, 4, np.asarray(text[4:30], np.int32), GREEDY)], frozenset({3}))
    after = [store[:, : rank.kv.capacity] for store in (*rank.kv.keys, *rank.kv.values)]
    assert all(torch.equal(a, b) for a, b in zip(kept, after))
    assert rank.kv.length(slot) == 29
    rank.kv.check()


@pytest.mark.parametrize(("first", "count"), [(-1, 4), (100, 61), (0, 97)])
def test_windows_that_do_not_fit_are_refused(first: int, count: int) -> None:
    rank = tiny_rank()
    with pytest.raises(ValueError, match="do not fit"):
        score(rank, [Window(0, first, np.zeros(count + 1, np.int32), GREEDY)], frozenset())


# --- a drafter that searches


def drafting(rank: CountingRank, slots: dict[str, int], **options: object) -> SwiftDrafter:
    settings = {"skip": "search:2", "sets": "default", "max_upstream": 8, "prefill_chunk": 32, "study_rows": 16}
    return SwiftDrafter(rank, SwiftOptions.model_validate({**settings, **options}), max_len=100, slot_of=slots.get)


def serve(drafter: SwiftDrafter, rank: CountingRank, slots: dict[str, int], name: str, seed: int) -> None:
    """A session as the scheduler leads it: the slot is freed before the drafter hears of the end."""
    text, said = random_tokens(seed, 8), random_tokens(seed + 100, 40)
    slots[name] = filled(rank, text)
    drafter.begin(name, text, GREEDY, len(text))
    for at in range(0, len(said), 8):
        block = said[at : at + 8]
        rank.forward([chain(slots[name], [text[-1], *block[:-1]], logits=False)])
        rank.kv.commit(slots[name], range(8))
        text = text + block
        drafter.commit(name, block)
    rank.kv.free(slots.pop(name), keep=len(text) - 1)
    drafter.end(name)


def test_a_search_goes_on_over_ended_sessions_until_their_text_is_used_up() -> None:
    rank, slots = tiny_rank(), dict[str, int]()
    drafter = drafting(rank, slots)
    assert not drafter.study()
    serve(drafter, rank, slots, "a", 0)
    rank.passes.clear()
    steps = 0
    while drafter.study():
        steps += 1
    assert 2 <= steps <= 3 * (1 + TRIES)
    assert rank.passes == []  # it has used the K/V that was there
    assert rank.kv.num_free == 4
    assert drafter.skip in SkipSpace(4, 2)


def test_a_slot_somebody_else_has_moved_into_is_not_studied() -> None:
    rank, slots = tiny_rank(num_slots=1), dict[str, int]()
    drafter = drafting(rank, slots)
    serve(drafter, rank, slots, "a", 0)
    assert drafter.study()
    slots["b"] = filled(rank, random_tokens(5, 8))
    drafter.begin("b", random_tokens(5, 8), GREEDY, 8)
    assert not drafter.study()


def test_nor_one_that_a_session_without_guesses_has_taken() -> None:
    rank, slots = tiny_rank(num_slots=1), dict[str, int]()
    drafter = drafting(rank, slots)
    serve(drafter, rank, slots, "a", 0)
    assert drafter.study()
    filled(rank, random_tokens(5, 8))  # no drafter hears of it
    assert not drafter.study()


def test_the_set_that_drafts_is_the_searchs_incumbent_and_is_kept_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, kept = frozenset({3, 4}), str(tmp_path / "search.json")

    def planted(rank: CountingRank, windows: list[Window], skip: SkipSet) -> np.ndarray:
        return np.arange(len(windows[0])) % (6 - 2 * len(skip & best)) == 0

    monkeypatch.setattr("drafters.skip_learner.score", planted)
    rank, slots = tiny_rank(), dict[str, int]()
    drafter = drafting(rank, slots, keep_in=kept)
    assert drafter.skip != best
    for seed in range(8):
        serve(drafter, rank, slots, "a", seed)
        while drafter.study():
            pass
    assert drafter.skip == best
    assert drafting(tiny_rank(), {}, keep_in=kept).skip == best


def test_a_search_is_refused_away_from_the_target_and_where_what_was_kept_is_none(tmp_path: Path) -> None:
    options = SwiftOptions.model_validate({"skip": "search:2", "max_upstream": 8})
    with pytest.raises(ConfigError, match="found:COUNT"):
        SwiftDrafter(tiny_rank(), options, max_len=100)
    kept = tmp_path / "search.json"
    for content in ("{", "{}"):
        kept.write_text(content)
        with pytest.raises(ConfigError, match="holds no search"):
            drafting(tiny_rank(), {}, keep_in=str(kept))


def test_sets_found_beforehand_are_taken_from_files(tmp_path: Path) -> None:
    rank = tiny_rank()
    write_set(tmp_path / "2.json", rank.config, frozenset({3, 4}), {"matchness": 0.5})
    options = {"sets": str(tmp_path), "max_upstream": 8}
    found = SwiftOptions.model_validate({"skip": "found:2", **options})
    assert SwiftDrafter(rank, found, max_len=100).skip == {3, 4}
    assert drafting(tiny_rank(), {}, **options).skip == {3, 4}
    with pytest.raises(ConfigError, match="search_skip makes one"):
        find_set(str(tmp_path), rank.config, 3)
    with pytest.raises(ConfigError, match="sub-layers of"):
        find_set(str(tmp_path), tiny_rank(num_layers=6).config, 2)
    assert find_set("default", rank.config, 2) is None


@pytest.mark.parametrize("path", sorted(ARTIFACTS.glob("*/swift/*.json")), ids=lambda path: str(path.stem))
def test_what_is_shipped_is_a_set_of_as_many_inner_sub_layers_as_its_name_says(path: Path) -> None:
    content = json.loads(path.read_text())
    space = SkipSpace(content["shape"]["num_layers"], int(path.stem))
    assert frozenset(content["skip"]) in space
    assert content["matchness"] > content["uniform_matchness"]
    assert content["provenance"]["trials"] > 0

"""Stores: what is found is what a scan of the text finds, on disk as in memory, and nothing that does not fit opens."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cluster.core.errors import ConfigError
from drafters import shipped, shipped_store
from drafters.datastore import (
    INDEX,
    TEXT,
    Datastore,
    StoreHeader,
    join,
    open_store,
    open_when_ready,
    text_type,
    write_index,
)
from drafters.live_store import LiveStores
from drafters.shipped_store import find_store
from drafters.suffix_array import DEPTH, suffix_array


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))


def documents(alphabet: int, count: int = 30, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, alphabet, int(rng.integers(1, 40))).tolist() for _ in range(count)]


def look_up(store: Datastore, run: list[int]) -> tuple[int, int]:
    found = (0, len(store))
    for length, token in enumerate(run):
        found = store.narrow(found, length, token)
    return found


def count_of(store: Datastore, run: list[int]) -> int:
    low, high = look_up(store, run)
    return high - low


def save(folder: Path, texts: list[list[int]], vocab_size: int, tokenizer: str = "t") -> Path:
    folder.mkdir(parents=True)
    text = join(texts, vocab_size)
    text.tofile(folder / TEXT)
    StoreHeader(vocab_size, tokenizer, len(text), len(texts), f"digest-{folder.name}").write(folder)
    return folder


@pytest.mark.parametrize(("alphabet", "vocab_size"), [(1, 1), (2, 5), (30, 49_152), (300, 70_000), (9, 65_535)])
def test_suffixes_stand_in_the_order_of_their_first_tokens(alphabet: int, vocab_size: int) -> None:
    text = join(documents(alphabet), vocab_size)
    order = suffix_array(text, vocab_size)
    assert sorted(order.tolist()) == list(range(len(text)))
    heads = [text[start : start + DEPTH].tolist() for start in order.tolist()]
    assert heads == sorted(heads)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_the_smallest_texts_are_ordered_too(size: int) -> None:
    assert suffix_array(np.zeros(size, np.uint16), 7).tolist() == list(range(size))[::-1]


@pytest.mark.parametrize(("alphabet", "vocab_size"), [(3, 5), (30, 49_152), (300, 70_000)])
def test_a_look_up_finds_what_a_scan_of_the_documents_finds(alphabet: int, vocab_size: int) -> None:
    texts = documents(alphabet)
    store = Datastore.of(texts, vocab_size)
    runs = Counter(tuple(t[i : i + n]) for t in texts for n in (1, 2, 3, 4) for i in range(len(t) - n + 1))
    for run, count in list(runs.items())[:400]:
        low, high = look_up(store, list(run))
        assert high - low == count
        behind = {token: n for token in range(alphabet) if (n := runs.get((*run, token), 0)) and len(run) < 4}
        if len(run) < 4:
            assert dict(store.followers((low, high), len(run), samples=10_000)) == behind
    assert count_of(store, [alphabet]) == count_of(store, [vocab_size]) == 0


def test_no_continuation_runs_into_the_next_document() -> None:
    store = Datastore.of([[1, 2], [3, 4]], 10)
    assert store.followers(look_up(store, [2]), 1, 8) == []
    assert store.followers(look_up(store, [1]), 1, 8) == [(2, 1)]


def test_samples_are_spread_evenly_over_all_that_was_found() -> None:
    store = Datastore.of([[7, token] for token in range(6) for _ in range(10)], 10)
    assert store.followers(look_up(store, [7]), 1, 12) == [(token, 2) for token in range(6)]


def test_ids_above_32767_are_read_back_unsigned(tmp_path: Path) -> None:
    folder = save(tmp_path / "s", [[40_000, 49_151, 40_000, 5]], 49_152)
    store = open_store(folder)
    assert store.text.dtype == np.uint16
    assert store.followers(look_up(store, [40_000]), 1, 8) == [(5, 1), (49_151, 1)]


@pytest.mark.parametrize(("vocab_size", "width"), [(65_535, 2), (65_536, 4)])
def test_two_bytes_hold_every_id_and_the_end_of_a_document(vocab_size: int, width: int) -> None:
    assert text_type(vocab_size).itemsize == width
    assert join([[vocab_size - 1]], vocab_size).tolist() == [vocab_size - 1, vocab_size]
    with pytest.raises(ValueError, match="outside"):
        join([[vocab_size]], vocab_size)


def test_a_store_without_an_index_is_ready_later_and_then_at_once(tmp_path: Path) -> None:
    folder = save(tmp_path / "s", documents(20), 100)
    ready = threading.Event()
    found: list[Datastore] = []
    open_when_ready(folder, lambda store: (found.append(store), ready.set())[0])
    assert ready.wait(30)
    open_when_ready(folder, found.append)
    assert len(found) == 2, "the second finds the index in the cache"
    assert np.array_equal(found[0].suffixes, found[1].suffixes)
    assert not (folder / INDEX).exists()


def test_an_index_beside_the_text_is_used(tmp_path: Path) -> None:
    folder = save(tmp_path / "s", documents(20), 100)
    write_index(np.fromfile(folder / TEXT, np.uint16), 100, folder / INDEX)
    found: list[Datastore] = []
    open_when_ready(folder, found.append)
    assert len(found) == 1
    assert not (tmp_path / "cache" / "stores").exists()


def test_a_folder_that_holds_no_store_or_a_cut_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a datastore"):
        find_store(str(tmp_path / "nothing"), 100, tmp_path)
    folder = save(tmp_path / "s", documents(20), 100)
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps(header | {"format": 99}))
    with pytest.raises(ConfigError, match="format 99"):
        open_store(folder)
    (folder / "header.json").write_text(json.dumps(header | {"num_tokens": 3}))
    with pytest.raises(ConfigError, match="header says 3"):
        open_when_ready(folder, lambda store: None)


def test_another_vocabulary_or_tokenizer_is_refused_naming_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "s", documents(20), 100, tokenizer="theirs")
    assert find_store(str(folder), 100, tmp_path) == folder, "no tokenizer.json: the size is all there is to compare"
    with pytest.raises(ConfigError, match="100 tokens, the target one of 101"):
        find_store(str(folder), 101, tmp_path)
    monkeypatch.setattr(shipped_store, "tokenizer_of", lambda folder: "ours")
    with pytest.raises(ConfigError, match=r"theirs.*ours"):
        find_store(str(folder), 100, tmp_path)


def test_the_default_is_the_shipped_store_of_the_targets_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(shipped_store, "tokenizer_of", lambda folder: "ours")
    assert find_store("default", 100, tmp_path) is None
    for name, tokenizer in (("a", "theirs"), ("b", "ours")):
        save(tmp_path / "artifacts" / name / "store", documents(20), 100, tokenizer)
    assert find_store("default", 100, tmp_path) == tmp_path / "artifacts" / "b" / "store"
    assert find_store("default", 101, tmp_path) is None


def test_a_live_store_finds_what_its_owner_wrote_and_nobody_elses() -> None:
    live = LiveStores(100, min_new=10)
    live.add("a", [1, 2, 3, 4, 5, 6, 7])
    assert live.of("a") is None, "too little to be worth an index"
    live.add("a", [8, 9, 8, 9])
    live.add("b", [50] * 12)
    live.wait()
    mine, theirs = live.of("a"), live.of("b")
    assert mine is not None
    assert theirs is not None
    assert mine.followers(look_up(mine, [8]), 1, 8) == [(9, 2)]
    assert count_of(mine, [50]) == 0
    assert count_of(theirs, [8]) == 0
    assert live.of("c") is None


def test_a_live_store_keeps_the_newest_outputs_and_the_latest_owners() -> None:
    live = LiveStores(100, max_tokens=20, max_owners=2, min_new=1)
    for start in range(0, 60, 10):
        live.add("a", list(range(start, start + 10)))
        live.wait()
    store = live.of("a")
    assert store is not None
    assert count_of(store, [30]) == 0
    assert count_of(store, [40]) == 1
    for owner in ("b", "c"):
        live.add(owner, [1, 2])
    live.wait()
    assert live.of("a") is None
    assert live.of("c") is not None

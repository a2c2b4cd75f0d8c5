"""``sssd.cpp`` from Python: built on first use, called through ctypes (which drops the GIL)."""

from __future__ import annotations

import ctypes
import functools
import itertools
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np

from cluster.core.native_build import NativeUnavailable, build_library
from cluster.core.token_tree import TokenTree
from drafters.datastore import Datastore
from drafters.ngram_tree import Rules

SOURCES = ("sssd.cpp", "store.h", "trie.h")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared")
MAX_STORES = 2

_PTR, _INT, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
_FUNCTIONS = {
    "text_new": ([_INT], _PTR),
    "text_free": ([_PTR], None),
    "text_extend": ([_PTR, _PTR, _LONG], None),
    "grow": ([_PTR, _PTR, _INT, _PTR, _INT, _INT, _INT, _DOUBLE, _PTR, _PTR, _PTR], _INT),
}


class _Store(ctypes.Structure):
    _fields_ = (
        *((name, _PTR) for name in ("text", "starts", "suffixes", "common", "shares")),
        *((name, _LONG) for name in ("size", "number")),
        *((name, _INT) for name in ("vocab", "wide", "num_common")),
    )


class _Rules(ctypes.Structure):
    """``Rules``, field by field."""

    _fields_ = (
        *((name, _INT) for name in ("query", "samples")),
        *((name, _DOUBLE) for name in ("own_weight", "store_cap", "prior", "negligible")),
        *((name, _INT) for name in ("chain", "outcome_samples")),
        ("beside", _DOUBLE),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Raises ``NativeUnavailable``."""
    path = build_library([Path(__file__).with_name(name) for name in SOURCES], FLAGS)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"the compiled library does not load: {error}") from error
    for name, (arguments, result) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    return loaded


_views: weakref.WeakKeyDictionary[Datastore, _Store] = weakref.WeakKeyDictionary()
_numbers = itertools.count()


def _view(store: Datastore) -> _Store:
    """Where ``store``'s arrays lie; they live as long as it does."""
    view = _views.get(store)
    if view is None:
        arrays = (store.text, store.starts, store.suffixes, store.common, store.shares)
        wide, sizes = store.text.itemsize == 4, (len(store), next(_numbers))
        view = _Store(*(a.ctypes.data for a in arrays), *sizes, store.vocab_size, wide, len(store.common))
        _views[store] = view
    return view


class _Room:
    """Where the library writes a tree of up to ``size`` nodes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tokens, self.parents = np.empty((2, size), np.int32)
        self.scores = np.empty(size, np.float32)
        self.addresses = [each.ctypes.data for each in (self.tokens, self.parents, self.scores)]


class NativeIndex:
    """``SessionIndex`` in C++. Raises ``NativeUnavailable`` where it cannot be built."""

    def __init__(self, rules: Rules) -> None:
        self._library = library()
        self._rules = ctypes.byref(_Rules(*astuple(rules)))
        self._text = self._library.text_new(rules.query)
        self._room = _Room(0)
        self._stores: Sequence[Datastore] = ()
        self._views = (_Store * MAX_STORES)()
        weakref.finalize(self, self._library.text_free, self._text)

    def extend(self, token_ids: Sequence[int]) -> None:
        tokens = array("i", token_ids)
        self._library.text_extend(self._text, tokens.buffer_info()[0], len(tokens))

    def grow(
        self,
        stores: Sequence[Datastore],
        max_nodes: int,
        max_depth: int,
        stage: int,
        outcomes: bool = False,
        min_score: float = 0.0,
    ) -> TokenTree:
        if max_nodes > self._room.size:
            self._room = _Room(max_nodes)
        if stores != self._stores:
            self._stores, self._views = stores, (_Store * MAX_STORES)(*map(_view, stores))
        count = self._library.grow(
            self._text,
            self._views,
            len(stores),
            self._rules,
            max_nodes,
            max_depth,
            outcomes,
            min_score,
            *self._room.addresses,
        )
        return TokenTree(
            self._room.tokens[:count].copy(),
            self._room.parents[:count].copy(),
            self._room.scores[:count].copy(),
            np.full(count, stage, np.uint8),
        )

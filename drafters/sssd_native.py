"""``sssd.cpp`` from Python: built on first use, called through ctypes (which drops the GIL)."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np

from cluster.core.native_build import NativeUnavailable, build_library
from cluster.core.token_tree import TokenTree
from drafters.datastore import Datastore
from drafters.ngram_tree import Rules

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared")
MAX_STORES = 2

_PTR, _INT, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
_FUNCTIONS = {
    "trie_new": ([_INT], _PTR),
    "trie_free": ([_PTR], None),
    "trie_extend": ([_PTR, _PTR, _LONG], None),
    "grow": ([_PTR, _PTR, _INT, _PTR, _PTR, _INT, _INT, _INT, _INT, _PTR, _PTR, _PTR], _INT),
}


class _Store(ctypes.Structure):
    _fields_ = (
        *((name, _PTR) for name in ("text", "starts", "suffixes", "common", "shares")),
        ("size", _LONG),
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
    path = build_library((Path(__file__).with_name("sssd.cpp"),), FLAGS)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"the compiled library does not load: {error}") from error
    for name, (arguments, result) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    return loaded


_views: weakref.WeakKeyDictionary[Datastore, _Store] = weakref.WeakKeyDictionary()


def _view(store: Datastore) -> _Store:
    """Where ``store``'s arrays lie; they live as long as it does."""
    view = _views.get(store)
    if view is None:
        arrays = (store.text, store.starts, store.suffixes, store.common, store.shares)
        wide = store.text.itemsize == 4
        view = _Store(*(a.ctypes.data for a in arrays), len(store), store.vocab_size, wide, len(store.common))
        _views[store] = view
    return view


class NativeIndex:
    """``SessionIndex`` in C++. Raises ``NativeUnavailable`` where it cannot be built."""

    def __init__(self, rules: Rules) -> None:
        self._library = library()
        self._query = rules.query
        self._rules = _Rules(*astuple(rules))
        self._trie = self._library.trie_new(rules.query)
        weakref.finalize(self, self._library.trie_free, self._trie)

    def extend(self, token_ids: Sequence[int]) -> None:
        tokens = np.asarray(token_ids, np.int32)
        self._library.trie_extend(self._trie, tokens.ctypes.data, len(tokens))

    def grow(
        self,
        tail: Sequence[int],
        stores: Sequence[Datastore],
        max_nodes: int,
        max_depth: int,
        stage: int,
        outcomes: bool = False,
    ) -> TokenTree:
        newest = np.asarray(tail[-self._query :], np.int32)
        views = (_Store * MAX_STORES)(*map(_view, stores))
        tokens, parents = np.empty(max_nodes, np.int32), np.empty(max_nodes, np.int32)
        scores = np.empty(max_nodes, np.float32)
        count = self._library.grow(
            self._trie,
            views,
            len(stores),
            ctypes.byref(self._rules),
            newest.ctypes.data,
            len(newest),
            max_nodes,
            max_depth,
            outcomes,
            tokens.ctypes.data,
            parents.ctypes.data,
            scores.ctypes.data,
        )
        return TokenTree.build(tokens[:count], parents[:count], scores[:count], stage)

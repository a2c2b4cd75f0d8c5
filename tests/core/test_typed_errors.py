"""Errors cross process boundaries: what a door needs to answer must survive pickling."""

from __future__ import annotations

import pickle

import pytest

from cluster.core import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PacelineError)]


def example(kind: type[errors.PacelineError]) -> errors.PacelineError:
    return errors.InvalidArgument("top_p", "is 7") if kind is errors.InvalidArgument else kind("what happened")


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_survives_pickling(kind: type[errors.PacelineError]) -> None:
    error = example(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_an_invalid_argument_carries_its_field_and_names_it() -> None:
    copy = pickle.loads(pickle.dumps(errors.InvalidArgument("speculation.max_nodes", "is too large")))
    assert (copy.field, copy.message) == ("speculation.max_nodes", "is too large")
    assert str(copy) == "speculation.max_nodes: is too large"


def test_overload_carries_when_to_retry() -> None:
    assert pickle.loads(pickle.dumps(errors.Overloaded("full", retry_after_s=2.5))).retry_after_s == 2.5

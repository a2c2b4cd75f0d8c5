"""Whose text is whose: equal for equal keys and salts, different for all others, and nobody's without either."""

from __future__ import annotations

import itertools

from deployments.codec import owner_of

REQUESTS = [
    ("Bearer one", ""),
    ("Bearer two", ""),
    ("Bearer one", "salt"),
    ("Bearer two", "salt"),
    ("Bearer onesalt", ""),
    ("Bearer o", "nesalt"),
    ("", "salt"),
    ("", "one"),
]


def test_every_pair_of_key_and_salt_is_an_owner_of_its_own() -> None:
    for (one, salt), (other, other_salt) in itertools.combinations(REQUESTS, 2):
        assert owner_of(one, salt) != owner_of(other, other_salt)


def test_the_same_key_and_salt_are_the_same_owner_however_the_header_is_written() -> None:
    assert owner_of("bearer one", "salt") == owner_of("Bearer  one ", "salt") == owner_of("Bearer one", "salt")


def test_without_a_key_and_a_salt_there_is_no_owner() -> None:
    for authorization in ("", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz"):
        assert owner_of(authorization, "") == ""


def test_an_owner_does_not_tell_the_key() -> None:
    assert "secret" not in owner_of("Bearer secret", "")

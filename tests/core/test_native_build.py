"""What is compiled once is kept; who has no place to keep it learns so by the one error that all look for."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.core.native_build import NativeUnavailable, build_library


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail_in_another_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, cache = tmp_path / "nothing.cpp", tmp_path / "cache"
    source.write_text("")
    cache.write_text("a file where a folder should be")
    monkeypatch.setenv("PACELINE_CACHE", str(cache))
    with pytest.raises(NativeUnavailable, match=r"nothing\.cpp"):
        build_library([source], ["-shared"])

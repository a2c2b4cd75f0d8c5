"""What `make run` refuses before it starts anything."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml

from deployments import up

CONFIG = {"http_options": {"port": 1}, "grpc_options": {"port": 2}, "applications": [{"name": "paceline"}]}


def test_a_config_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    assert up.read(path) == CONFIG


@pytest.mark.parametrize("missing", ["http_options", "grpc_options", "applications"])
def test_what_a_config_file_lacks_is_named(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in CONFIG.items() if key != missing}))
    with pytest.raises(up.SetupError, match=missing):
        up.read(path)


@pytest.mark.parametrize("text", [None, "a: [", "just text"])
def test_what_is_no_config_file_is_refused_by_name(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(up.SetupError, match=r"config\.yaml"):
        up.read(path)


def test_a_door_that_somebody_listens_on_is_not_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(up, "STATE", tmp_path / "state.json")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(up.SetupError, match=f"port {port} is in use"):
            up.start_ray([port])
    assert up._is_free(port)

"""What `make run` refuses before it starts anything."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from deployments import up

CONFIG = {
    "http_options": {"host": "127.0.0.1", "port": 1},
    "grpc_options": {"port": 2},
    "applications": [{"name": "paceline"}],
}


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


@pytest.mark.parametrize("http", [{"port": 1}, {"port": 1, "host": None}])
def test_a_config_file_says_where_http_listens(tmp_path: Path, http: dict[str, object]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "http_options": http}))
    with pytest.raises(up.SetupError, match=r"needs http_options\.host: .* every interface"):
        up.read(path)


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "localhost", "ray://127.0.0.1:8265"])
def test_what_is_no_dashboards_address_is_refused_by_name(address: str) -> None:
    with pytest.raises(up.SetupError, match=f"'{address}' is no dashboard's address; allowed: http://HOST:PORT"):
        up.applications(address)


def test_a_dashboard_that_refuses_the_token_is_not_called_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import AuthenticationError

    def refuse(address: str) -> object:
        raise AuthenticationError("401")

    # Ray's own is not even imported: it would set this process' way of authentication for other tests.
    client = SimpleNamespace(ServeSubmissionClient=refuse)
    monkeypatch.setitem(sys.modules, "ray.dashboard.modules.serve.sdk", client)
    with pytest.raises(up.SetupError, match=r"refuses this user's token; allowed: .*auth_token"):
        up.applications("http://127.0.0.1:8265")


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

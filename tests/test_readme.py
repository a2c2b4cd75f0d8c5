"""The README holds: its commands and examples parse or run, its tables are the configuration's, its files exist."""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.core.config import DraftersConfig, EngineConfig, ModelConfig, ServiceConfig, StageConfig
from cluster.core.errors import InvalidArgument
from cluster.core.types import FinishReason, GenerateRequest, Origin, SamplingParams, SpeculationStats
from deployments.ingress_grpc import client_request
from deployments.ingress_http import Envelope
from deployments.openai_api import ChatBody, CompletionBody, parse_body
from deployments.service import Answer, Usage
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert found
    return found


@pytest.mark.parametrize("kind", [ServiceConfig, ModelConfig, EngineConfig, DraftersConfig, StageConfig])
def test_every_field_is_in_the_table_with_its_default(kind: type[BaseModel]) -> None:
    section = PROSE.split(f"### {kind.__name__}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.+) \|$", section, re.MULTILINE)
    assert {name: default for name, default, _ in rows} == {
        name: written(field) for name, field in kind.model_fields.items()
    }
    assert all(meaning.strip() for _, _, meaning in rows)


def written(field: FieldInfo) -> str:
    """A default as the tables have it: in YAML, and of a model only what it sets."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    value = value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=200).removesuffix("...\n").strip()
    return f"`{text}`"


def test_linked_and_named_files_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)", PROSE)
    named = re.findall(r"`([\w.-]+/[\w./-]*|\w+\.(?:py|md|yaml))`", PROSE)
    assert len(links) > 5
    assert len(named) > 30
    missing = [name for name in {*links, *named} if not (ROOT / name).exists() and not any(ROOT.glob(f"*/{name}"))]
    assert missing == []


def test_what_one_request_passes_through_is_defined_where_it_says() -> None:
    section = PROSE.split("## Follow one request")[1].split("\n## ")[0]
    places = re.findall(r"`([\w/]+\.py)`\s+`(\w+)`(?: and `(\w+)`)?", section)
    assert len(places) > 20
    for path, *names in places:
        nodes = ast.walk(ast.parse((ROOT / path).read_text()))
        defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
        assert {name for name in names if name} <= defined, path


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: block.split("\n")[0][:40])
def test_shell_blocks_parse(block: str) -> None:
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", TEXT, re.MULTILINE))
    assert {"run", "stop", "test"} <= named <= targets


def test_modules_know_the_options_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    runs = re.findall(r"python -m (\S+)(.*)", "".join(blocks("bash")))
    assert len(runs) == 3
    for module, arguments in runs:
        with pytest.raises(SystemExit):
            importlib.import_module(module).main(["--help"])
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        given = {word for word in shlex.split(arguments) if word.startswith("--")}
        assert given, module
        assert given <= known, module


def test_the_doors_would_take_the_bodies_that_curl_sends() -> None:
    calls = re.findall(r"^curl -\w+ \S+/v1/(\S+) -d '(.*?)'$", "".join(blocks("bash")), re.DOTALL | re.MULTILINE)
    assert len(calls) == 3
    for path, body in calls:
        if path == "chat/completions":
            parse_body(ChatBody, body.encode()).client_request()
        else:
            parse_body(CompletionBody, body.encode()).client_request()


def test_vllms_fields_are_served_or_refused_as_it_says() -> None:
    named = PROSE.split("Through `extra_body` go")[1].split("and the rest")[0]
    served, refused = (re.findall(r"`(\w+)`", part) for part in named.split("refused by name"))
    assert len(served) > 10
    assert len(refused) > 10
    assert set(served) <= set(ChatBody.model_fields)
    for name in refused:
        with pytest.raises(InvalidArgument, match=name):
            parse_body(ChatBody, json.dumps({"messages": [], name: 2}).encode())


def test_the_context_lengths_to_raise_are_the_default_configurations() -> None:
    section = PROSE.split("### Another model\n")[1].split("\n#")[0]
    config = yaml.safe_load((ROOT / "deployments/configs/cpu.yaml").read_text())
    service, drafters = (application["args"] for application in config["applications"])
    assert service["engine"]["max_model_len"] == drafters["max_model_len"] == 2048
    for words in ("2,048 tokens", "`engine.max_model_len`", "drafters' `max_model_len`"):
        assert words in section


def test_the_openai_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with http_door() as port:
        run(example("import openai").replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
    assert capsys.readouterr().out.startswith("red\n{'rounds': 1")


def test_the_grpc_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with grpc_door() as port:
        run(example("import grpc").replace("127.0.0.1:9000", f"127.0.0.1:{port}"))
    assert capsys.readouterr().out == "red [5] ['ORIGIN_SMALL']\nlocal\n"


def example(first_line: str) -> str:
    (block,) = [block for block in blocks("python") if block.startswith(first_line)]
    return block


def run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


class HttpDoor(BaseHTTPRequestHandler):
    """Reads a chat as the real door does and gives one fixed answer to it."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parse_body(ChatBody, body).client_request()
        stats = SpeculationStats(rounds=1, drafted=1, accepted=1, tokens_by_origin=(0, 1, 0))
        answer = Answer("r", "red", (5,), (Origin.SMALL,), 7, FinishReason.STOP, Usage(3, 1), stats)
        request = GenerateRequest("r", (1, 2, 3), SamplingParams())
        content = json.dumps(Envelope(ChatBody, request, "model").whole(answer)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextlib.contextmanager
def http_door() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), HttpDoor) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


class GrpcDoor(generation_pb2_grpc.GenerationServicer):  # type: ignore[misc]
    """Reads a request as the real door does and streams one fixed item."""

    def GenerateStream(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.StreamItem]:
        client_request(request)
        yield pb.StreamItem(text="red", token_ids=[5], origins=[pb.ORIGIN_SMALL])

    def GetLoad(self, request: pb.GetLoadRequest, context: grpc.ServicerContext) -> pb.GetLoadResponse:
        return pb.GetLoadResponse(replicas=[pb.ReplicaLoad(last_choice="local")])


@contextlib.contextmanager
def grpc_door() -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(2))
    generation_pb2_grpc.add_GenerationServicer_to_server(GrpcDoor(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None).wait()

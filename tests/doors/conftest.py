"""The service on real Serve over ``FakeEngine``, and clients of both doors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.core.config import EngineConfig, ModelConfig, ServiceConfig
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

MODEL = "fake"
MAX_MODEL_LEN = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('only the first message may be of the system') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Doors:
    """The service's addresses and clients."""

    http: httpx.Client
    url: str
    address: str
    channel: grpc.Channel
    stub: generation_pb2_grpc.GenerationStub
    health: health_pb2_grpc.HealthStub

    def running(self) -> int:
        return sum(replica.running for replica in self.stub.GetLoad(pb.GetLoadRequest(), timeout=10).replicas)

    def serving(self) -> bool:
        answer = self.health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def eventually(holds: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    """Whether ``holds`` becomes true."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte. Printable bytes have the highest ids: text never chooses a mode of the fake engine."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda char: (char.isascii(), char))
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def deployed(ray_cluster, tokenizer_folder: Path) -> Iterator[Doors]:  # type: ignore[no-untyped-def]
    from ray import serve

    from deployments.app import service_application

    config = ServiceConfig(
        model=ModelConfig(source=str(tokenizer_folder), name=MODEL, threads=1),
        engine=EngineConfig(max_model_len=MAX_MODEL_LEN, priorities=True),
        request_timeout_s=60.0,
        replay_timeout_s=60.0,
        target={"health_check_period_s": 1.0, "ray_actor_options": {"num_cpus": 0.1}},
    )
    application = service_application(config, "tests.doors.fake_engine:build_engine")
    serve.run(application, name="paceline", route_prefix="/")
    url, address = f"http://127.0.0.1:{ray_cluster.http_port}", f"127.0.0.1:{ray_cluster.grpc_port}"
    with httpx.Client(base_url=url, timeout=30.0) as http, grpc.insecure_channel(address) as channel:
        stub, health = generation_pb2_grpc.GenerationStub(channel), health_pb2_grpc.HealthStub(channel)
        yield Doors(http, url, address, channel, stub, health)
    serve.delete("paceline")


@pytest.fixture
def doors(deployed: Doors) -> Doors:
    """The service, serving and idle: an earlier test may have killed its target."""
    assert eventually(deployed.serving)
    assert eventually(lambda: deployed.running() == 0)
    return deployed

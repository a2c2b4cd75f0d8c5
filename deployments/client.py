"""A gRPC client for the terminal: an answer as it streams, every token in the colour of its origin.

    python -m deployments.client --prompt "Why is the sky blue?" --stream --compare

The server's text comes by step, a step's tokens may differ in origin, so the client decodes token by token with the
model's own tokenizer. Where that is not at hand (another vocabulary, ``--tokenizer ''``) text is shown without colours.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from cluster.core.config import ModelConfig
from cluster.core.errors import PacelineError
from cluster.core.types import STAGE_NAMES, tokenizer_hash
from cluster.rounds.detokenize import StreamDecoder
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

COLOURS: dict[int, str] = {pb.ORIGIN_SMALL: "32", pb.ORIGIN_MEDIUM: "33", pb.ORIGIN_TARGET: "36"}
NAMES: dict[int, str] = {pb.ORIGIN_SMALL: "small", pb.ORIGIN_MEDIUM: "medium", pb.ORIGIN_TARGET: "target"}

RECONNECT = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000))
REPLAY_PAUSE_S, MOST_PAUSE_S = 0.1, 1.0  # before a call is repeated: twice as long each time it breaks at once
DEAD_ACTOR = ("ActorDiedError", "ActorUnavailableError", "The actor died", "actor is dead")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m deployments.client", description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("--prompt", required=True, help="what to ask")
    made.add_argument("--address", default="127.0.0.1:9000", help="the gRPC door (default: %(default)s)")
    made.add_argument("--stream", action="store_true", help="show tokens as they come instead of the whole answer")
    made.add_argument("--raw", action="store_true", help="send the prompt as plain text, without the chat template")
    made.add_argument("--max-tokens", type=int, default=128, help="output tokens at most (default: %(default)s)")
    made.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="same request and seed: same tokens (default: %(default)s)")
    made.add_argument("--no-speculation", action="store_true", help="plain decoding: same tokens, other speed")
    made.add_argument(
        "--stages", default="", help="comma-separated stages to ask, whether they pay or not: small,medium"
    )
    made.add_argument("--compare", action="store_true", help="ask again without speculation and compare")
    made.add_argument(
        "--tokenizer",
        default=ModelConfig().source,
        help="the model's source, for colours; '' for none (default: %(default)s)",
    )
    made.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    return made


def build_request(args: argparse.Namespace, speculation: bool) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        sampling_params=pb.SamplingParams(temperature=args.temperature, seed=args.seed, max_tokens=args.max_tokens),
        speculation=pb.Speculation(
            enabled=speculation, stages=[stage for stage in args.stages.split(",") if stage] if speculation else []
        ),
    )
    if args.raw:
        request.prompt = args.prompt
    else:
        request.messages.messages.add(role="user", content=args.prompt)
    return request


@dataclass
class Painter:
    """Prints tokens: one by one through ``tokenizer`` (a ``tokenizers.Tokenizer``), or with None the step's text."""

    colours: bool
    tokenizer: Any = None
    _decoder: StreamDecoder | None = field(default=None, init=False)

    def paint(self, text: str, origin: int) -> str:
        return f"\x1b[{COLOURS[origin]}m{text}\x1b[0m" if self.colours and text else text

    def legend(self) -> str:
        names = ", ".join(self.paint(name, origin) for origin, name in NAMES.items())
        return f"tokens by origin: {names}"

    def show(self, text: str, token_ids: Sequence[int], origins: Sequence[int]) -> None:
        if self.tokenizer is None:
            print(text, end="", flush=True)
            return
        if self._decoder is None:
            self._decoder = StreamDecoder(self.tokenizer, ())
        painted = (
            self.paint(self._decoder.step(token), origin) for token, origin in zip(token_ids, origins, strict=True)
        )
        print("".join(painted), end="", flush=True)


def open_channel(address: str) -> grpc.Channel:
    """A channel that finds a door again within a second of its return; gRPC by itself may take two minutes."""
    return grpc.insecure_channel(address, options=RECONNECT)


def replaying_stream(
    stub: generation_pb2_grpc.GenerationStub,
    request: pb.GenerateRequest,
    patience_s: float = 60.0,
    on_replay: Callable[[grpc.RpcError], None] = lambda error: None,
) -> Generator[pb.StreamItem, None, None]:
    """Items of one answer, even where the door that streams it dies: the call is repeated with the tokens received.

    Output is a function of prompt, parameters and seed, so the items together are those of an undisturbed call; only
    the last item's usage and statistics are of the last call alone. ``on_replay`` is told of each call that broke.
    Raises ``grpc.RpcError`` where no door has brought an item for ``patience_s``, and for whatever is not a door's
    death. Closing the iterator cancels the call.
    """
    ask = pb.GenerateRequest()
    ask.CopyFrom(request)
    heard, pause_s = time.monotonic(), REPLAY_PAUSE_S
    over = False
    for number in itertools.count(1):
        call = stub.GenerateStream(ask)
        try:
            for item in call:
                heard, pause_s = time.monotonic(), REPLAY_PAUSE_S
                ask.resume_token_ids.extend(item.token_ids)
                if item.HasField("seed"):
                    ask.sampling_params.seed = item.seed
                over = item.finish_reason != pb.FINISH_REASON_UNSPECIFIED
                yield item
            return
        except grpc.RpcError as error:
            if over:  # only the call's status is lost
                return
            if not door_died(error) or time.monotonic() - heard > patience_s:
                raise
            on_replay(error)
        finally:
            call.cancel()
        if request.request_id:  # the broken call's may still run
            ask.request_id = f"{request.request_id}.{number}"
        time.sleep(pause_s)
        pause_s = min(2.0 * pause_s, MOST_PAUSE_S)


def door_died(error: grpc.RpcError) -> bool:
    """Whether the same call may succeed at another door, or at the same one later.

    Of a killed ingress replica Serve says INTERNAL, and names the dead actor.
    """
    code, details = error.code(), error.details() or ""
    return code == grpc.StatusCode.UNAVAILABLE or (
        code == grpc.StatusCode.INTERNAL and any(name in details for name in DEAD_ACTOR)
    )


@dataclass(frozen=True, slots=True)
class Run:
    """What one request came to; ``first_s`` and ``total_s`` are seconds from sending it."""

    token_ids: list[int]
    stats: pb.SpeculationStats
    first_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        return len(self.token_ids) / self.total_s

    def summary(self, painter: Painter) -> str:
        stats = self.stats
        counts = {
            pb.ORIGIN_SMALL: stats.tokens_small,
            pb.ORIGIN_MEDIUM: stats.tokens_medium,
            pb.ORIGIN_TARGET: stats.tokens_target,
        }
        origins = ", ".join(painter.paint(f"{NAMES[origin]} {count}", origin) for origin, count in counts.items())
        return (
            f"{len(self.token_ids)} tokens in {self.total_s:.2f} s ({self.tokens_per_s:.1f} tokens/s, "
            f"first after {self.first_s:.2f} s); {stats.rounds} rounds, "
            f"{stats.mean_accepted_length:.2f} tokens a round, "
            f"{stats.accepted} of {stats.drafted} drafted accepted; {origins}"
        )


def ask(
    stub: generation_pb2_grpc.GenerationStub, request: pb.GenerateRequest, stream: bool, painter: Painter | None
) -> Run:
    """Send ``request`` and show its tokens. Raises ``grpc.RpcError``."""
    answers: Iterable[Any] = replaying_stream(stub, request) if stream else _once(stub, request)
    start, first_s, token_ids, stats = time.monotonic(), 0.0, [], pb.SpeculationStats()
    for answer in answers:
        first_s = first_s or time.monotonic() - start
        token_ids.extend(answer.token_ids)
        stats = answer.speculation
        if painter is not None:
            painter.show(answer.text, answer.token_ids, answer.origins)
    return Run(token_ids, stats, first_s, time.monotonic() - start)


def _once(stub: generation_pb2_grpc.GenerationStub, request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
    yield stub.Generate(request)


def find_tokenizer(source: str, expected_hash: str) -> Any:
    """A ``tokenizers.Tokenizer`` of the served vocabulary, or None with a word on stderr about why there is none."""
    if not source:
        return None
    # Heavy, and needed for colours only.
    from cluster.engine.weights import load_tokenizer, resolve_model

    try:
        tokenizer = load_tokenizer(resolve_model(source, weights=False))
    except (PacelineError, OSError, ValueError) as error:
        print(f"no colours: the tokenizer of {source} cannot be loaded: {error}", file=sys.stderr)
        return None
    if tokenizer_hash(tokenizer.get_vocab()) != expected_hash:
        print(f"no colours: the server's vocabulary is not that of {source}; see --tokenizer", file=sys.stderr)
        return None
    return tokenizer.backend_tokenizer


def compare(stub: generation_pb2_grpc.GenerationStub, args: argparse.Namespace, run: Run) -> str:
    """Ask again without speculation. Raises ``PacelineError`` where tokens differ: they must not."""
    plain = ask(stub, build_request(args, speculation=False), args.stream, None)
    if plain.token_ids != run.token_ids:
        raise PacelineError("plain decoding gave other tokens: the engine broke its guarantee (vLLM gives none)")
    speed = run.tokens_per_s / plain.tokens_per_s
    return (
        f"plain decoding: the same {len(plain.token_ids)} tokens in {plain.total_s:.2f} s; speculation is {speed:.2f} x"
    )


def wants_colours(choice: str) -> bool:
    if choice == "auto":
        return sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return choice == "always"


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    unknown = [stage for stage in args.stages.split(",") if stage and stage not in STAGE_NAMES]
    if unknown:
        print(f"error: --stages: {unknown[0]!r} is not one of {', '.join(STAGE_NAMES)}", file=sys.stderr)
        return 2
    with open_channel(args.address) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        try:
            info = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=10.0)
            painter = Painter(wants_colours(args.color))
            if painter.colours:
                painter.tokenizer = find_tokenizer(args.tokenizer, info.tokenizer_hash)
                print(f"{info.model} on {args.address}; {painter.legend()}\n")
            run = ask(stub, build_request(args, not args.no_speculation), args.stream, painter)
            print(f"\n\n{run.summary(painter)}")
            if args.compare:
                print(compare(stub, args, run))
        except grpc.RpcError as error:
            print(f"error: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1
        except PacelineError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What a running service does, at a glance: replicas, sessions, acceptance, and what the governor chooses.

python -m deployments.status [--address HOST:PORT] [--dashboard URL]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deployments.up import RAY_ENV, STATE, SetupError, applications, describe
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

TIMEOUT_S = 5.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m deployments.status", description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("--address", default="127.0.0.1:9000", help="the gRPC door (default: %(default)s)")
    made.add_argument("--dashboard", default=_dashboard(), help="Ray's dashboard (default: %(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Print the status. Returns 0 where a target serves, 1 where none does or nobody answers."""
    args = parser().parse_args(argv)
    os.environ.update({"RAY_AUTH_MODE": RAY_ENV["RAY_AUTH_MODE"]})
    try:
        with grpc.insecure_channel(args.address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
            serving = answer.status == health_pb2.HealthCheckResponse.SERVING
            print(f"{args.address}  {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")
            print("\n".join(application_lines(args.dashboard)))
            if serving:
                stub = generation_pb2_grpc.GenerationStub(channel)
                print(model_line(stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=TIMEOUT_S)))
                for replica in stub.GetLoad(pb.GetLoadRequest(), timeout=TIMEOUT_S).replicas:
                    print("\n".join(("", *replica_lines(replica))))
    except grpc.RpcError as error:
        print(f"error: no service answers at {args.address}: {error.code().name}: {error.details()}", file=sys.stderr)
        print("`make run` starts one here; --address names the door of another.", file=sys.stderr)
        return 1
    return 0 if serving else 1


def application_lines(dashboard: str) -> Iterator[str]:
    """Serve's view: every deployment's replicas, running of wanted."""
    try:
        found = applications(dashboard)
    except SetupError as error:
        yield f"replicas are not known: {error}"
        return
    if found is None:
        yield f"replicas are not known: Ray's dashboard does not answer at {dashboard}"
    for name, state in (found or {}).items():
        yield describe(name, state)


def model_line(info: pb.GetModelInfoResponse) -> str:
    stages = ", ".join(info.stages) or "none"
    return f"{info.model} ({info.architecture}, {info.dtype}, {info.kernels} kernels); drafting stages: {stages}"


def replica_lines(load: pb.ReplicaLoad) -> Iterator[str]:
    """One target replica: a headline, then a line for each thing that there is something to say of."""
    yield f"target {load.replica}"
    yield (
        f"  requests    {load.running} running, {load.waiting} waiting; "
        f"{load.kv_slots_used} of {load.kv_slots_total} KV slots, {load.kv_usage:.0%} of KV positions"
    )
    yield f"  sessions    leased from {_counts(load.drafter_sessions)}"
    yield f"  acceptance  {acceptance(load.stats)}"
    if load.drafts_wanted:
        yield (
            f"  remote      {load.drafts_wanted:,} rounds wanted a tree: "
            f"{load.drafts_cached / load.drafts_wanted:.0%} found it ready, "
            f"{load.drafts_missing / load.drafts_wanted:.0%} got none"
        )
    for name, stage in sorted(load.stages.items()):
        yield f"  {name:<10}  {stage_line(stage, load.deadline_misses[name])}"
    if load.last_choice:
        yield f"  governor    {load.last_choice}"
    governor = load.governor
    if sum(governor.choices.values()):
        yield f"  nodes       {nodes_line(governor)}"
    if governor.measured_tokens_per_s:
        yield (
            f"  speed       {governor.measured_tokens_per_s:.0f} tokens/s of late "
            f"where {governor.expected_tokens_per_s:.0f} were expected"
        )


def acceptance(stats: pb.EngineStats) -> str:
    """Mean accepted length of the rounds that verified a tree, bonus token included, and each stage's share."""
    if not stats.drafts:
        return "no tree verified yet"
    length = 1 + sum(stats.accepted.values()) / stats.drafts
    shares = ", ".join(
        f"{stage} {stats.accepted[stage] / drafted:.0%} of {drafted:,} nodes"
        for stage, drafted in sorted(stats.drafted.items())
        if drafted
    )
    return f"{length:.2f} tokens a round with a tree; accepted: {shares}"


def stage_line(stage: pb.StageStats, misses: int) -> str:
    """A remote stage: whether it is in use, how long its workers take, and what of its trees came to nothing."""
    state = f"{stage.breakers_open} worker(s) LEFT OUT until a probe succeeds" if stage.breakers_open else "in use"
    took = f" of {1e3 * stage.busy_s / stage.answers:.1f} ms" if stage.answers else ""
    return (
        f"{state}; {stage.answers:,} answers{took}, {misses:,} deadlines missed, "
        f"breakers opened {stage.breaker_openings:,} times; "
        f"trees: {stage.late_trees:,} late, {stage.refused_trees:,} refused; {stage.wasted_nodes:,} nodes wasted"
    )


def nodes_line(governor: pb.GovernorReport) -> str:
    """How much is guessed, and why: reasons by how many steps had them."""
    steps = sum(governor.choices.values())
    mean = governor.nodes.total / max(1, sum(governor.nodes.counts))
    reasons = sorted(governor.choices.items(), key=lambda item: -item[1])
    why = ", ".join(f"{reason.replace('_', ' ')} {count / steps:.0%}" for reason, count in reasons)
    return f"{mean:.1f} verified a step ({why})"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items())) or "nobody"


def _dashboard() -> str:
    """The one that `make run` started from this folder, else where Ray puts it."""
    return str(json.loads(STATE.read_text())["dashboard"]) if STATE.exists() else "http://127.0.0.1:8265"


if __name__ == "__main__":
    raise SystemExit(main())

"""The faults: what is done to which process, what is promised, and how it is seen that all is well again.

A fault's ``strike`` does it, waits until the service has recovered and returns how long that took, in seconds from the
moment the fault began (where a process died) or ended (where one was stopped, cut off or lying).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.faults.head import alive, frozen, kill, wait_until
from benchmarks.faults.link import LinkedHead
from benchmarks.faults.service import DEADLINE_MS, Layout, Rig

Strike = Callable[[Rig], float]
HANG_S = 4.0
LIE_S = 4.0
CUT_S = 6.0
LIMIT_S = 300.0
"""A trial gives up after so long, whatever is promised."""


@dataclass(frozen=True, slots=True)
class Fault:
    """``pause_s`` and ``recovery_s`` are the promises; ``because`` says what they are made of."""

    name: str
    what: str
    happens: str
    strike: Strike
    pause_s: float
    recovery_s: float
    because: str
    layout: Layout = field(default_factory=Layout)


def nothing(rig: Rig) -> float:
    return wait_until(rig.speculates(), LIMIT_S, "speculation")


def worker_killed(stage: str) -> Strike:
    def strike(rig: Rig) -> float:
        victim = rig.pid(stage)
        kill(victim)
        return wait_until(rig.drafts(stage, besides=victim), LIMIT_S, f"trees of a new {stage} worker are verified")

    return strike


def worker_hung(stage: str) -> Strike:
    def strike(rig: Rig) -> float:
        with frozen(rig.pid(stage)):
            time.sleep(HANG_S)
        return wait_until(rig.drafts(stage), LIMIT_S, f"trees of the {stage} worker are verified again")

    return strike


def all_hung(rig: Rig) -> float:
    with frozen(rig.pid("small")), frozen(rig.pid("medium")):
        time.sleep(HANG_S)
    return wait_until(rig.drafts("medium"), LIMIT_S, "trees of the medium worker are verified again")


def worker_stuck(stage: str) -> Strike:
    def strike(rig: Rig) -> float:
        victim = rig.pid(stage)
        with frozen(victim):
            passed = wait_until(
                rig.drafts(stage, besides=victim), LIMIT_S, f"a new {stage} worker's trees are verified"
            )
            return passed + wait_until(lambda: not alive(victim), 60.0, "the stuck worker's process is gone")

    return strike


def drafters_cut_off(rig: Rig) -> float:
    assert isinstance(rig.head, LinkedHead)
    with rig.head.unplugged():
        time.sleep(CUT_S)
    return wait_until(rig.drafts("medium"), LIMIT_S, "trees from behind the cable are verified again")


def drafters_lie(rig: Rig) -> float:
    rig.lies.touch()
    time.sleep(LIE_S)
    rig.lies.unlink()
    return wait_until(rig.speculates(), LIMIT_S, "guesses are accepted again")


def target_killed(part: str = "target") -> Strike:
    """One of a target's processes: its replica's, or another rank's."""

    def strike(rig: Rig) -> float:
        victim = rig.loads()[0].worker_pids
        kill(victim[part])

        def replaced() -> bool:
            targets = rig.targets()
            return len(targets) == rig.layout.targets and victim["target"] not in targets

        passed = wait_until(replaced, LIMIT_S, "another target serves in its place")
        return passed + wait_until(rig.speculates(), LIMIT_S, "speculation")

    return strike


def actor_killed(title: str) -> Strike:
    """One of Serve's own actors, by its process title."""

    def strike(rig: Rig) -> float:
        victim = rig.actor(title)
        kill(victim)
        passed = wait_until(
            lambda: any(pid != victim for pid in rig.head.named(title)), LIMIT_S, f"another {title} runs"
        )
        passed += wait_until(rig.serving, LIMIT_S, "the doors answer")
        return passed + wait_until(rig.speculates(), LIMIT_S, "speculation")

    return strike


def gcs_killed(rig: Rig) -> float:
    """What a cluster cannot do without its GCS is start processes: so a worker dies as well, once the GCS is back."""
    victim = rig.head.gcs_pid()
    kill(victim)
    passed = wait_until(lambda: rig.head.gcs_pid() not in (0, victim), LIMIT_S, "the keeper has started the GCS")
    return passed + worker_killed("small")(rig)


DEADLINE_S = DEADLINE_MS / 1e3
NO_WAIT = f"twice the deadline for trees ({DEADLINE_S:g} s), then the breaker is open; the rest is the machine's noise"
NEW_WORKER = "Ray starts a process, which loads the drafter; sessions are handed over by resync"
NEW_TARGET = "Serve notices, starts a replica, which loads the model; streams are replayed"

FAULTS: tuple[Fault, ...] = (
    Fault("none", "nothing", "the load by itself, for comparison", nothing, 5.0, 5.0, "the machine's noise"),
    Fault(
        "small_killed",
        "small drafter's worker: kill -9",
        "rounds go on with medium alone; Ray restarts the worker",
        worker_killed("small"),
        5.0,
        40.0,
        f"pause: {NO_WAIT}. Recovery: {NEW_WORKER}",
    ),
    Fault(
        "medium_killed",
        "medium drafter's worker: kill -9",
        "rounds go on with small's trees, or none; Ray restarts the worker",
        worker_killed("medium"),
        5.0,
        40.0,
        f"pause: {NO_WAIT}. Recovery: {NEW_WORKER}",
    ),
    Fault(
        "small_hung",
        f"small drafter's worker: SIGSTOP for {HANG_S:g} s",
        "its breaker opens after two deadlines, medium is asked alone; a probe closes it",
        worker_hung("small"),
        5.0,
        10.0,
        f"pause: {NO_WAIT}. Recovery: a probe a second",
    ),
    Fault(
        "medium_hung",
        f"medium drafter's worker: SIGSTOP for {HANG_S:g} s",
        "its breaker opens after two deadlines, small's trees are verified; a probe closes it",
        worker_hung("medium"),
        5.0,
        10.0,
        f"pause: {NO_WAIT}. Recovery: a probe a second",
    ),
    Fault(
        "small_stuck",
        "small drafter's worker: SIGSTOP for good",
        "as above; Serve's health checks give the worker up and another replica brings another",
        worker_stuck("small"),
        5.0,
        150.0,
        "recovery: three health checks of 20 s each, then a new replica and worker",
    ),
    Fault(
        "one_small_hung",
        f"one of two small workers: SIGSTOP for {HANG_S:g} s",
        "sessions that lease the other one keep their trees",
        worker_hung("small"),
        5.0,
        10.0,
        f"pause: {NO_WAIT}. Recovery: a probe a second",
        Layout(smalls=2),
    ),
    Fault(
        "governed_medium_killed",
        "medium drafter's worker: kill -9, under `governor: auto`",
        "rounds go on as is fastest without it; Ray restarts the worker",
        worker_killed("medium"),
        5.0,
        40.0,
        f"pause: {NO_WAIT}. Recovery: {NEW_WORKER}",
        Layout(governed=True),
    ),
    Fault(
        "governed_all_hung",
        f"every draft worker: SIGSTOP for {HANG_S:g} s, under `governor: auto`",
        "their breakers open, rounds go on without trees; probes close them",
        all_hung,
        5.0,
        20.0,
        f"pause: {NO_WAIT}. Recovery: a probe a second, then the governor looks at what they are worth",
        Layout(governed=True),
    ),
    Fault(
        "drafters_cut_off",
        f"the drafters' host: its network link down for {CUT_S:g} s",
        "rounds go on without trees; when packets flow again so do trees",
        drafters_cut_off,
        5.0,
        20.0,
        f"pause: {NO_WAIT}. Recovery: TCP's next retransmission, then a probe",
        Layout(drafters_apart=True),
    ),
    Fault(
        "drafters_lie",
        f"both drafters answer rubbish for {LIE_S:g} s",
        "wrong, circular, oversized trees, tokens and lengths that do not exist: refused, or verified and not accepted",
        drafters_lie,
        5.0,
        10.0,
        "a lie costs the rows it was verified with",
        Layout(liar=True),
    ),
    Fault(
        "target_killed",
        "the only target's replica: kill -9",
        "streams pause until another replica has loaded, then go on after their last token",
        target_killed(),
        90.0,
        90.0,
        NEW_TARGET,
    ),
    Fault(
        "target_of_two_killed",
        "one of two target replicas: kill -9",
        "its streams go on at the other one at once",
        target_killed(),
        10.0,
        90.0,
        "pause: Serve's handle learns of the death with the broken call. Recovery: " + NEW_TARGET,
        Layout(targets=2),
    ),
    Fault(
        "rank_killed",
        "rank 1 of a tensor-parallel target (2 ranks): kill -9",
        "the other rank ends with it, Serve replaces the replica whole, streams are replayed",
        target_killed("rank 1"),
        120.0,
        120.0,
        NEW_TARGET,
        Layout(ranks=2),
    ),
    Fault(
        "rank_of_two_killed",
        "rank 1 of one of two tensor-parallel targets (2 ranks each): kill -9",
        "the other rank ends with it; its streams go on at the other target at once",
        target_killed("rank 1"),
        10.0,
        120.0,
        f"pause: the rank's death is noticed within a step. Recovery: {NEW_TARGET}",
        Layout(targets=2, ranks=2),
    ),
    Fault(
        "ingress_killed",
        "the ingress replica: kill -9",
        "calls in flight end; clients repeat them with the tokens received",
        actor_killed("ServeReplica:paceline:Ingress"),
        60.0,
        60.0,
        "Serve starts another one",
    ),
    Fault(
        "proxy_killed",
        "Serve's proxy: kill -9",
        "both ports are gone, calls end UNAVAILABLE; clients repeat them with the tokens received",
        actor_killed("ProxyActor"),
        60.0,
        60.0,
        "a health check a second (RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=1), then Serve starts another one",
    ),
    Fault(
        "controller_killed",
        "Serve's controller: kill -9",
        "requests do not pass it; Ray restarts it, and it takes its state from the GCS",
        actor_killed("ServeController"),
        5.0,
        60.0,
        "a process start",
    ),
    Fault(
        "gcs_killed",
        "the cluster's GCS: kill -9, and a small worker once it is back",
        "requests do not pass it; the keeper starts it again on its storage, and it starts a new worker",
        gcs_killed,
        5.0,
        90.0,
        "the keeper notices at once; raylets and workers connect again",
    ),
)
BY_NAME = {fault.name: fault for fault in FAULTS}

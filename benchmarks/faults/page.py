"""``docs/faults.md`` from a run's results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.faults.catalogue import BY_NAME

HEAD = """# Faults

Written by `python -m benchmarks.faults --docs docs/faults.md`. Every fault strikes real processes of a real service
(Ray, Serve, both draft stages as workers of their own, a tiny fp32 target) under steady load: {streams} gRPC streams
at any time, greedy and sampled requests in turn, each answer compared, ids and text, with the undisturbed one.

* **Lost** requests and **differing** answers have to be 0. Where the door itself dies, the client repeats the call with
  the tokens it has (`deployments.client.replaying_stream`); what counts is the whole answer.
* **Pause** is the longest wait for an item in any stream from the fault on, the first item's included.
* **Recovery** is counted from the kill, or from the end of a hang, cut or lie, until drafts of every stage are verified
  again. In brackets: what is promised on a machine with nothing else to do; bold: not kept.
"""

COLUMNS = (
    "fault",
    "what happens",
    "requests",
    "lost",
    "differing",
    "repeated calls",
    "pause, s (at most)",
    "recovery, s (at most)",
)

NOTES = """## What is behind it

* The target never waits for a drafter beyond a deadline; a worker that misses two in a row is left out until a probe is
  answered in time (`cluster/rounds/pipeline.py`). So a drafter's fault costs speed, and each row's pause is the noise
  of a machine on which a process is being started.
* A killed target's streams are replayed by the ingress from prompt, seed and delivered tokens
  (`deployments/replay.py`); requests that come while no target serves wait for one, `replay_timeout_s` at most. A
  target whose engine has failed tells its calls and ends its process: one that only refused would be offered every call
  first, being idle, until Serve gave it up after three health checks. A refusal is not one of the `max_replays` deaths
  that a request survives. `Abort` does not find a request that waits for a target just then.
* A killed rank ends its whole target: the others notice within a step, Serve replaces the replica with all its ranks.
* A killed ingress replica ends calls INTERNAL, naming a dead actor: Serve decides that, not the door. A killed proxy
  ends them UNAVAILABLE. `replaying_stream` repeats both.
* The GCS comes back only where its state is on disk and something starts it again (`docs/deploy.md`).
* The lying drafter is the real worker with a set-up hook (`benchmarks/faults/liar.py`), the partition a real one: the
  drafters' node is in a network namespace whose link goes down (as root only; left out elsewhere).
* `python -m benchmarks.soak` runs 2,000 requests and more with deaths and leaving clients mixed in, and asks what stays
  behind: memory, slots, sessions, leases, actors, references (`benchmarks/results/soak.json`: nothing).
"""


def page(results: Sequence[dict[str, Any]], skipped: dict[str, str], provenance: dict[str, Any], streams: int) -> str:
    """Markdown."""
    measured = {result["fault"] for result in results}
    absent = [name for name in BY_NAME if name not in measured and name not in skipped]
    lines = [
        HEAD.format(streams=streams),
        f"{provenance['cores']} cores of {provenance['cpu']}, revision {provenance['revision']}, {provenance['date']}."
        f" {provenance.get('note', '')}".rstrip(),
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"| --- | --- |{' ---: |' * (len(COLUMNS) - 2)}",
        *(_row(result) for result in results),
    ]
    lines += [f"\nNot run here: {name}: {why}." for name, why in skipped.items()]
    lines += [f"\nNot measured yet: {', '.join(absent)}."] if absent else []
    lines += ["\n## What the promises are made of\n"]
    lines += [f"* {BY_NAME[result['fault']].what}: {BY_NAME[result['fault']].because}." for result in results]
    return "\n".join([*lines, "", NOTES])


def _row(result: dict[str, Any]) -> str:
    fault = BY_NAME[result["fault"]]
    recovery = "did not recover" if result["recovery_s"] is None else f"{result['recovery_s']:.1f}"
    cells = (
        fault.what,
        fault.happens,
        str(result["requests"]),
        str(result["lost"]),
        str(result["differing"]),
        str(result["replays"]),
        _beside(f"{result['longest_pause_s']:.1f}", result["longest_pause_s"], fault.pause_s),
        _beside(recovery, result["recovery_s"], fault.recovery_s),
    )
    return f"| {' | '.join(cells)} |"


def _beside(shown: str, seconds: float | None, promised: float) -> str:
    """A measured time and the promised one; bold where the promise was not kept."""
    kept = seconds is not None and seconds <= promised
    return f"{shown if kept else f'**{shown}**'} ({promised:g})"

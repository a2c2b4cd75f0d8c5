"""One fault after the other on real processes of a real service under load: is any request lost or different?

    python -m benchmarks.faults [--faults small_killed,proxy_killed] [--requests 100]
        [--out benchmarks/results/faults.json] [--docs docs/faults.md]

Starts Ray and the service by itself, one cluster for each layout that the faults need; nothing else on the machine is
touched. The last line is JSON; the exit status is 1 where a request was lost or differed, or a promise was not kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.faults import link, load, trial
from benchmarks.faults.catalogue import BY_NAME, FAULTS, Fault
from benchmarks.faults.page import page
from benchmarks.faults.service import Layout, running
from benchmarks.faults.trial import say
from benchmarks.provenance import provenance


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", default=",".join(BY_NAME), help=f"of {', '.join(BY_NAME)} (default: all)")
    parser.add_argument("--requests", type=int, default=100, help="under each fault, at least (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="results as JSON; those of faults not run now are kept")
    parser.add_argument("--docs", type=Path, help="the page to write from all results there are")
    parser.add_argument("--note", default="", help="a sentence about the machine, for the page")
    args = parser.parse_args(argv)
    names = args.faults.split(",")
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        parser.error(f"--faults: {unknown[0]!r} is not one of {', '.join(BY_NAME)}")
    chosen = [fault for fault in FAULTS if fault.name in names]
    skipped: dict[str, str] = {}
    if any(fault.layout.drafters_apart for fault in chosen) and (why := link.missing()):
        skipped = {fault.name: why for fault in chosen if fault.layout.drafters_apart}
        say(f"left out: {skipped}")
    chosen = [fault for fault in chosen if fault.name not in skipped]
    facts = {**provenance(), "requests": args.requests, "streams": load.STREAMS, "skipped": skipped, "note": args.note}
    found: list[dict[str, Any]] = []
    for result in measure(chosen, args.requests):
        found.append(result)
        if args.out:
            args.out.write_text(json.dumps({**facts, "results": merged(args.out, found)}, indent=1) + "\n")
    if args.docs:
        args.docs.write_text(page(merged(args.out, found), skipped, facts, load.STREAMS))
    print(json.dumps({**facts, "results": found}))
    return int(not all(result["within"] for result in found))


def measure(faults: list[Fault], requests: int) -> Iterator[dict[str, Any]]:
    """Every fault's result as it comes, layout by layout: the faults of one layout share a cluster."""
    with tempfile.TemporaryDirectory(prefix="plf-model-") as folder:
        for layout in dict.fromkeys(fault.layout for fault in faults):
            say(f"starting a service: {described(layout)}")
            with running(layout, Path(folder)) as rig:
                say("undisturbed answers first")
                expected = load.undisturbed(rig.address)
                for fault in (fault for fault in faults if fault.layout == layout):
                    say(f"--- {fault.name}")
                    result = trial.run(fault, rig, requests, expected, say)
                    yield {**asdict(result), "within": result.within(fault)}
                    say(f"{result}")


def merged(file: Path | None, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New results, and those in ``file`` of faults that were not run now, in the catalogue's order."""
    kept = json.loads(file.read_text())["results"] if file and file.exists() else []
    found = {result["fault"]: result for result in [*kept, *results]}
    return [found[name] for name in BY_NAME if name in found]


def described(layout: Layout) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(layout).items())


if __name__ == "__main__":
    raise SystemExit(main())

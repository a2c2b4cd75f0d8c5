"""One worker process: loads engines of one family, then answers one line of JSON with one line of JSON.

    python -m benchmarks.engines.worker --engine FAMILY < requests > replies

Runs in a peer's environment as well, so nothing heavy is imported before the family's own module. The first line in
is the ``Setup``, the first line out {"ready": versions} or {"unavailable": reason}. Later ones answer
{"generate": ask}, {"counters": engine}, {"processes": true} and {"probe": true}, with {"error": text} where that fails.
The worker ends when its input does.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from typing import Any, TextIO

from benchmarks.engines.base import Ask, Engine, Prompt, Setup, Unavailable

PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, help="family: a module of benchmarks.engines")
    parser.add_argument("--dies-with-parent", action="store_true", help="a stopped worker would outlive it otherwise")
    args = parser.parse_args(argv)
    if args.dies_with_parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = _own_stdout()
    module = importlib.import_module(f"benchmarks.engines.{args.engine}")
    setup = Setup.from_json(json.loads(sys.stdin.readline()))
    try:
        engine: Engine = module.Loaded(setup)
    except Exception as error:
        traceback.print_exc()
        reason = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
        _write(replies, {"unavailable": reason})
        return 1
    _write(replies, {"ready": engine.versions})
    try:
        for line in iter(sys.stdin.readline, ""):
            _write(replies, _answer(engine, json.loads(line)))
    finally:
        engine.close()
    return 0


def _own_stdout() -> TextIO:
    """The pipe to the parent; whatever libraries print goes to stderr from here on."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return pipe


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "generate" in request:
            fields = request["generate"]
            prompts = tuple(Prompt(prompt["index"], tuple(prompt["token_ids"])) for prompt in fields["prompts"])
            return {"answers": [asdict(answer) for answer in engine.generate(Ask(**{**fields, "prompts": prompts}))]}
        if "counters" in request:
            return {"counters": engine.counters(request["counters"])}
        if "processes" in request:
            return {"processes": engine.processes()}
        return {"probe": engine.probe()}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _write(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what is to be kept is written; threads of the engines' libraries need not be waited for

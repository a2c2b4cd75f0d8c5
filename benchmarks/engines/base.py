"""What an engine of the comparison is: prompts as token ids in, token ids and seconds out.

Imports the standard library only: workers load this module in the peers' environments, too. Everything here but
``Engine`` travels as one line of JSON between ``process.Worker`` and ``worker``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Unavailable(Exception):
    """An engine cannot run here; the message says why, and what would help."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker loads.

    model: folder of safetensors in fp32, loaded as bf16 by every engine. gguf: the same weights as bf16 GGUF.
    quantised: the file they come from. lengths: every prompt's number of tokens, for engines that build code by length.
    address: of a running service, or none to start one from ``config``.
    """

    engines: tuple[str, ...]
    model: str
    gguf: str | None
    quantised: str | None
    peers: str
    eos_token_ids: tuple[int, ...]
    lengths: tuple[int, ...]
    max_tokens: int
    max_model_len: int
    max_concurrency: int
    threads: int
    address: str | None
    config: str

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Setup:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Prompt:
    """``index`` names the prompt in a whole comparison, and is its seed."""

    index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """Generate for ``prompts``, ``concurrency`` at a time, up to end of text or ``max_tokens``.

    ``salt``: what was computed or learnt under one salt must not serve another, since the same prompts come again.
    """

    engine: str
    prompts: tuple[Prompt, ...]
    concurrency: int
    temperature: float
    max_tokens: int
    salt: str


@dataclass(frozen=True, slots=True)
class Answer:
    """``token_ids``: end-of-text token included. ``seconds``: from handing the prompt over to its last token.

    ``rounds``: steps of the target that yielded tokens; None where the engine does not tell.
    """

    index: int
    token_ids: tuple[int, ...]
    seconds: float
    rounds: int | None = None


class Engine(Protocol):
    """One or several of a family's engines, loaded. Constructed with the ``Setup``; may raise ``Unavailable``."""

    versions: dict[str, str]

    def generate(self, ask: Ask) -> list[Answer]:
        """Answers in any order."""
        ...

    def counters(self, engine: str) -> dict[str, float]:
        """Totals since loading: ``steps``, and seconds by part of the round. Empty where they are not known.

        ``tokens`` and ``accepted`` stand for ``Answer.rounds`` where accepted tokens are counted for all sessions.
        """
        ...

    def processes(self) -> list[int]:
        """Process ids outside the worker's own Unix session that belong to the engine, and may be stopped by signal."""
        ...

    def probe(self) -> dict[str, Any]:
        """What else the engine measures of itself, once a run; empty for most."""
        ...

    def close(self) -> None: ...


class Defaults:
    """The optional half of ``Engine``."""

    versions: dict[str, str]

    def counters(self, engine: str) -> dict[str, float]:
        return {}

    def processes(self) -> list[int]:
        return []

    def probe(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        return None


def own_cores() -> list[int]:
    """The cores this process may run on."""
    return sorted(os.sched_getaffinity(0))


def session_members(leader: int) -> list[int]:
    """Processes of the Unix session that ``leader`` began."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[3]) == leader:
                members.append(int(stat.parent.name))
    return members


def until_end(token_ids: Sequence[int], eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    """``token_ids`` up to and including the first end-of-text token."""
    for at, token in enumerate(token_ids):
        if token in eos_token_ids:
            return tuple(token_ids[: at + 1])
    return tuple(token_ids)


def peer_python(peers: str, name: str) -> str:
    """The interpreter of a peer's environment. Raises ``Unavailable`` where it was not made."""
    python = Path(peers) / name / "bin" / "python"
    if not python.exists():
        raise Unavailable(f"no environment in {python.parent.parent}: bash benchmarks/setup_peers.sh {peers} {name}")
    return str(python)

"""Typed errors, raised by the engine and mapped to HTTP and gRPC status codes by the doors.

Each class is one row of that mapping (``deployments/codec.py``); a caller never has to parse a message.
"""

from __future__ import annotations


class PacelineError(Exception):
    """Base of every error Paceline raises on purpose."""


class InvalidArgument(PacelineError):
    """A request field is wrong. HTTP 400, gRPC INVALID_ARGUMENT.

    ``field`` is the name the client used (for example ``top_p`` or ``speculation.max_nodes``).
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type[InvalidArgument], tuple[str, str]]:
        return (InvalidArgument, (self.field, self.message))


class TooLarge(PacelineError):
    """A request's body is too large. HTTP 413, gRPC INVALID_ARGUMENT."""


class NotFound(PacelineError):
    """The named model or request does not exist. HTTP 404, gRPC NOT_FOUND. ``field``: where it was named, if in one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[type[NotFound], tuple[str, str | None]]:
        return (NotFound, (str(self), self.field))


class AlreadyExists(PacelineError):
    """A request of this id is running. HTTP 409, gRPC ALREADY_EXISTS."""


class Overloaded(PacelineError):
    """The engine refuses new work: its waiting queue is full. HTTP 429, gRPC RESOURCE_EXHAUSTED."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[Overloaded], tuple[str, float]]:
        return (Overloaded, (str(self), self.retry_after_s))


class DeadlineExceeded(PacelineError):
    """The request's own deadline passed. HTTP 504, gRPC DEADLINE_EXCEEDED."""


class Aborted(PacelineError):
    """The request was aborted by its client or by ``Abort``. HTTP 499, gRPC CANCELLED."""


class EngineUnavailable(PacelineError):
    """No engine can serve the request now (loading, stopped, died). HTTP 503, gRPC UNAVAILABLE."""


class EngineDied(EngineUnavailable):
    """The process of an engine, or of one of its ranks, died with the request in it. Another one can go on."""


class EngineFailed(PacelineError):
    """A step of this request crashed the engine. HTTP 500, gRPC INTERNAL."""


class ConfigError(PacelineError):
    """The configuration cannot be served; the message names the key, the value and what is allowed."""


class InvalidTree(PacelineError):
    """A token tree breaks its invariants; the sender is at fault, the target's output is not affected."""


class UnknownSession(PacelineError):
    """A drafter was asked about a session it does not hold (or holds at another length): resync it."""

"""From what a failed call to a target raises, to what a client reads. No cluster."""

from __future__ import annotations

import pickle

import grpc
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from cluster.core import errors
from cluster.core.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    EngineDied,
    EngineFailed,
    EngineUnavailable,
    InvalidArgument,
    Overloaded,
    PacelineError,
)
from deployments.codec import INTERNAL, STATUSES, public_message, status_of
from deployments.ingress_http import error_response
from deployments.targets import typed_error


def as_ray_raises_it(error: Exception) -> Exception:
    """``error`` the way Ray hands it to a caller: of both classes, over a pickle."""
    wrapped = RayTaskError("generate", "Traceback: secret", error).as_instanceof_cause()
    assert isinstance(wrapped, Exception)
    return wrapped


@pytest.mark.parametrize(
    "error", [InvalidArgument("top_p", "bad"), Overloaded("full", 3.0), Aborted("x"), DeadlineExceeded("x")]
)
def test_our_own_errors_come_back_as_they_were_raised(error: PacelineError) -> None:
    back = typed_error(as_ray_raises_it(pickle.loads(pickle.dumps(error))))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.__dict__ == error.__dict__


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (ActorDiedError(), EngineDied),
        (as_ray_raises_it(ActorDiedError()), EngineDied),
        (BackPressureError(5, 5, 429, 2.0), Overloaded),
        (RequestCancelledError("id"), Aborted),
        (as_ray_raises_it(ValueError("secret")), EngineFailed),
        (ValueError("secret"), EngineFailed),
    ],
    ids=["target died", "a rank died", "back-pressure", "cancelled", "a bug there", "a bug here"],
)
def test_rays_and_serves_errors_get_a_type_of_ours(raised: Exception, kind: type[PacelineError]) -> None:
    error = typed_error(raised)
    assert type(error) is kind
    assert "secret" not in str(error)


def test_every_error_that_a_client_can_cause_has_its_own_status() -> None:
    internal = {errors.EngineFailed, errors.ConfigError, errors.InvalidTree, errors.UnknownSession}
    assert status_of(EngineDied("x")) is status_of(EngineUnavailable("x"))
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PacelineError)}
    assert kinds - internal - {PacelineError, EngineDied} == set(STATUSES)
    assert len({status.http for status in STATUSES.values()}) == len(STATUSES)


def test_an_id_in_use_is_a_conflict() -> None:
    status = status_of(AlreadyExists("request_id: 'x' is running already"))
    assert (status.http, status.grpc) == (409, grpc.StatusCode.ALREADY_EXISTS)


def test_clients_are_kept_from_repeating_what_would_fail_again() -> None:
    for error in (DeadlineExceeded("took longer than 1 s"), EngineFailed("a step crashed")):
        assert error_response(error).headers["x-should-retry"] == "false"
    for error in (Overloaded("full"), EngineUnavailable("loading"), AlreadyExists("x"), ValueError("a bug")):
        assert "x-should-retry" not in error_response(error).headers


def test_an_unlisted_error_is_internal_and_says_only_the_request_id() -> None:
    error = EngineFailed("secret")
    assert status_of(error) is INTERNAL
    assert "secret" not in public_message(error, "req-7")
    assert "req-7" in public_message(error, "req-7")

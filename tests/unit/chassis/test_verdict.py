"""What becomes of an event whose handler failed."""

import asyncpg
import pytest
from google.protobuf.message import DecodeError

from chassis.bus.verdict import Verdict, judge
from chassis.db.pool import database_is_away
from chassis.errors import (
    Aborted,
    DataLoss,
    DomainError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Unavailable,
    disk_full,
    is_away,
)
from chassis.rpc.untyped_errors import domain_error_of
from chassis.settings import ChassisSettings

SETTINGS = ChassisSettings(
    service_name="tester", consumer_failures_max=4, consumer_backoff_s_min=0.5, consumer_backoff_s_max=1.5
)


@pytest.mark.parametrize("error", [InvalidArgument("INVALID_FIELD", "x"), DataLoss("DATA_CORRUPT", "x")])
def test_what_can_never_succeed_is_dead_at_once(error: DomainError) -> None:
    assert judge(error, failures=1, settings=SETTINGS) == Verdict(dead=True, reason=error.reason)


@pytest.mark.parametrize("error", [asyncpg.CheckViolationError("x"), asyncpg.NumericValueOutOfRangeError("x")])
def test_what_no_row_can_hold_is_dead_at_once(error: Exception) -> None:
    assert judge(error, failures=1, settings=SETTINGS) == Verdict(dead=True, reason="EVENT_INVALID")


def test_unreadable_bytes_are_dead_at_once() -> None:
    assert judge(DecodeError("x"), failures=1, settings=SETTINGS) == Verdict(dead=True, reason="EVENT_INVALID")


@pytest.mark.parametrize(
    "error", [NotFound("NOT_FOUND", "x"), FailedPrecondition("STATE_CONFLICT", "x"), Aborted("LEASE_STALE", "x")]
)
def test_what_may_succeed_later_waits_longer_each_time(error: DomainError) -> None:
    waits = [judge(error, failures=failures, settings=SETTINGS).retry_in_s for failures in (1, 2, 3)]
    assert waits == [0.5, 1.0, 1.5]
    assert judge(error, failures=4, settings=SETTINGS) == Verdict(dead=True, reason=error.reason)


def test_defect_is_dead_as_internal_after_the_limit() -> None:
    assert judge(ZeroDivisionError(), failures=3, settings=SETTINGS).retry_in_s == 1.5
    assert judge(ZeroDivisionError(), failures=4, settings=SETTINGS) == Verdict(dead=True, reason="INTERNAL")


def test_wait_stays_bounded_after_very_many_failures() -> None:
    settings = SETTINGS.model_copy(update={"consumer_failures_max": 10**9})
    assert judge(ZeroDivisionError(), failures=10**8, settings=settings).retry_in_s == 1.5


def test_only_a_dependency_that_is_away_excuses() -> None:
    assert is_away(Unavailable("DEPENDENCY_UNAVAILABLE", "x"))
    assert is_away(disk_full("the disk of the database")), "as a peer may answer"
    assert not is_away(FailedPrecondition("STATE_CONFLICT", "x"))
    assert not is_away(ZeroDivisionError())


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        TimeoutError(),
        asyncpg.ConnectionDoesNotExistError("x"),
        asyncpg.CannotConnectNowError("the database system is starting up"),
        asyncpg.AdminShutdownError("x"),
        asyncpg.TooManyConnectionsError("x"),
        asyncpg.DeadlockDetectedError("x"),
        asyncpg.SerializationError("x"),
        asyncpg.QueryCanceledError("canceling statement due to statement timeout"),
        asyncpg.LockNotAvailableError("x"),
        asyncpg.IdleInTransactionSessionTimeoutError("x"),
        asyncpg.ReadOnlySQLTransactionError("x"),
        asyncpg.PostgresIOError("x"),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.InterfaceError("cannot call Connection.fetch(): connection has been released back to the pool"),
    ],
)
def test_database_away(error: Exception) -> None:
    """Loops try again, and callers are told to."""
    assert database_is_away(error)
    assert isinstance(domain_error_of(error, "trace"), Unavailable)


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.UniqueViolationError("x"),
        asyncpg.UndefinedColumnError("x"),
        asyncpg.DataError("value out of range"),
        asyncpg.InterfaceError("the server expects 2 arguments for this query, 3 were passed"),
        ValueError(),
    ],
)
def test_not_the_databases_absence(error: Exception) -> None:
    assert not database_is_away(error)
    assert isinstance(domain_error_of(error, "trace"), Internal)


def test_a_missing_file_is_no_lost_dependency() -> None:
    assert isinstance(domain_error_of(FileNotFoundError(), "trace"), Internal)

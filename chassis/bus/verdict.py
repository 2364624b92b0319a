"""What becomes of an event whose handler failed: a pure decision. It knows no event and no table."""

from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError

from chassis.db.pool import value_is_refused
from chassis.errors import DomainError
from chassis.settings import ChassisSettings

# The event itself is wrong: no later attempt can end differently.
_PERMANENT = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.DATA_LOSS,
    }
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Done, retry after `retry_in_s`, or dead for `reason`."""

    retry_in_s: float | None = None
    dead: bool = False
    reason: str = ""

    @classmethod
    def done(cls) -> "Verdict":
        return cls()

    @classmethod
    def retry(cls, in_s: float) -> "Verdict":
        return cls(retry_in_s=in_s)


def judge(error: Exception, *, failures: int, settings: ChassisSettings) -> Verdict:
    """`failures` counts this one. Not found or a wrong state may only mean that an earlier event is still on its
    way."""
    if isinstance(error, DecodeError) or value_is_refused(error):
        return Verdict(dead=True, reason="EVENT_INVALID")
    if isinstance(error, DomainError) and error.code in _PERMANENT:
        return Verdict(dead=True, reason=error.reason)
    if failures >= settings.consumer_failures_max:
        return Verdict(dead=True, reason=error.reason if isinstance(error, DomainError) else "INTERNAL")
    delay_s = settings.consumer_backoff_s_min * 2.0 ** min(failures - 1, 30)
    return Verdict.retry(min(delay_s, settings.consumer_backoff_s_max))

"""Typed errors of the client, unpacked from `google.rpc.Status`. It knows no call and no resource."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

STATUS_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One faulty field, or one faulty line of a dataset."""

    field: str
    description: str


@dataclass(kw_only=True)
class FinemeshError(Exception):
    """Any refusal or failure. `reason` is one of finemesh.common.v1.ErrorReason without its prefix; `message` is for
    people."""

    message: str
    reason: str = "INTERNAL"
    violations: tuple[Violation, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.message} [{self.reason}]"]
        lines += [f"  {v.field}: {v.description}" for v in self.violations]
        return "\n".join(lines)


class InvalidRequest(FinemeshError):
    """The request or the dataset is wrong; the violations name each field or line."""


class NotFound(FinemeshError):
    """No such resource in this project."""


class AlreadyExists(FinemeshError):
    """The name or the request id is taken."""


class Conflict(FinemeshError):
    """The resource's state does not allow the call, or somebody else was first."""


class Unauthenticated(FinemeshError):
    """The API key is missing, unknown or revoked."""


class PermissionDenied(FinemeshError):
    """The API key's roles do not allow the call."""


class RateLimited(FinemeshError):
    """A limit was reached; `retry_after_s` says when to come back, if known."""


class BalanceInsufficient(FinemeshError):
    """The prepaid balance does not cover the price; the metadata carries `shortfall_nanos_usd`."""


class Unavailable(FinemeshError):
    """The platform, or a part that the call needs, cannot be reached now; retrying is safe."""


class TimedOut(FinemeshError):
    """The deadline passed before the answer came."""


class Cancelled(FinemeshError):
    """The call was cancelled."""


class DataLoss(FinemeshError):
    """Bytes do not match their digest."""


class Internal(FinemeshError):
    """An unexpected failure on the server; the message carries the trace id to quote."""


BY_STATUS: Mapping[grpc.StatusCode, type[FinemeshError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: Conflict,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RateLimited,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimedOut,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DATA_LOSS: DataLoss,
}
# The mesh packs details into every error of its own. Without any it is gRPC's word for a connection that broke in the
# middle of a call, such as "Internal error from Core" for an upload whose gateway was killed.
BROKEN = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})
BY_REASON: Mapping[str, type[FinemeshError]] = {"BALANCE_INSUFFICIENT": BalanceInsufficient}
DEFAULT_REASON: Mapping[grpc.StatusCode, str] = {
    grpc.StatusCode.UNAVAILABLE: "DEPENDENCY_UNAVAILABLE",
    grpc.StatusCode.DEADLINE_EXCEEDED: "DEADLINE_TOO_SHORT",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "SIZE_LIMIT",
    grpc.StatusCode.CANCELLED: "CANCELLED",
    grpc.StatusCode.UNIMPLEMENTED: "NOT_OFFERED",
}


def _status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The packed status of a failed call; empty when the server sent none."""
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return status_pb2.Status()


def from_rpc_error(error: grpc.aio.AioRpcError) -> FinemeshError:
    """The typed error of a failed call. A status without details keeps grpc's own message."""
    status, code = _status_of(error), error.code()
    reason, metadata, violations, retry_after_s = DEFAULT_REASON.get(code, "INTERNAL"), {}, [], None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            request = error_details_pb2.BadRequest.FromString(detail.value)
            violations += [Violation(field=v.field, description=v.description) for v in request.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay: Duration = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            retry_after_s = delay.seconds + delay.nanos / 1e9
    kind = BY_REASON.get(reason) or BY_STATUS.get(code, Internal)
    if not status.details and code in BROKEN:
        kind, reason = Unavailable, DEFAULT_REASON[grpc.StatusCode.UNAVAILABLE]
    return kind(
        message=status.message or error.details() or code.name,
        reason=reason,
        violations=tuple(violations),
        metadata=metadata,
        retry_after_s=retry_after_s,
    )

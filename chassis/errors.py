"""The one typed error list: raised by handlers, packed into `google.rpc.Status`, unpacked to the same classes.

It knows gRPC's codes and the shape of the details; what a reason means is in `finemesh/common/v1/error_reason.proto`.
"""

import errno
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "finemesh"
# Of whoever cannot write because a disk has no room; nothing is known then about the work itself.
DISK_FULL = "DISK_FULL"
DETAILS_KEY = "grpc-status-details-bin"
# The details travel base64-coded and the message percent-coded in one header block, and a stock client may refuse a
# block of more than 8 KiB: 4/3 of the one and 3 times the other stay below.
DETAILS_BYTES_MAX = 4 * 1024
TEXT_BYTES_MAX = 800


@dataclass(frozen=True)
class FieldViolation:
    """`field` is a path in the request, or in a dataset `line 12: $.messages[0].role`."""

    field: str
    description: str


class DomainError(Exception):
    """`reason` is a value of ErrorReason without its prefix; `message` is for people and says what to do."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        violations: Sequence[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class InvalidArgument(DomainError):
    code = grpc.StatusCode.INVALID_ARGUMENT


def invalid(field: str, problem: str, *, message: str | None = None, reason: str = "INVALID_FIELD") -> InvalidArgument:
    """The error for one field of a request; the message is the field and the problem, unless another is given."""
    text = f"{field} {problem}" if message is None else message
    return InvalidArgument(reason, text, violations=[FieldViolation(field, problem)])


def refuse_invalid(violations: Sequence[FieldViolation]) -> None:
    """Raises the error for all of these fields, in the words of the first; without any it does nothing."""
    if violations:
        first = violations[0]
        raise InvalidArgument("INVALID_FIELD", f"{first.field} {first.description}", violations=violations)


class NotFound(DomainError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(DomainError):
    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(DomainError):
    code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhausted(DomainError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class OutOfRange(DomainError):
    code = grpc.StatusCode.OUT_OF_RANGE


class PermissionDenied(DomainError):
    code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(DomainError):
    code = grpc.StatusCode.UNAUTHENTICATED


class Aborted(DomainError):
    """A lost race or a stale lease: reading again and deciding anew may succeed, repeating will not."""

    code = grpc.StatusCode.ABORTED


class Unavailable(DomainError):
    """Nothing was done, or what was done is safe to repeat."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(DomainError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Unimplemented(DomainError):
    code = grpc.StatusCode.UNIMPLEMENTED


class DataLoss(DomainError):
    code = grpc.StatusCode.DATA_LOSS


class Cancelled(DomainError):
    code = grpc.StatusCode.CANCELLED


class Internal(DomainError):
    code = grpc.StatusCode.INTERNAL


# What a system says of a disk without room: for anybody, for this user, for a file of that size.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_AWAY = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def disk_full(disk: str) -> ResourceExhausted:
    """`disk` says whose, such as "the disk of the artifact store". Without a pause after which to repeat: how long it
    stays full, only people know."""
    cure = "nothing was kept; have space freed there, then repeat the call"
    return ResourceExhausted(DISK_FULL, f"{disk} is full and {cure}")


def is_away(error: Exception) -> bool:
    """Whether a part that the work needs is away, too slow or without room: this says nothing about the work, which may
    succeed later."""
    return isinstance(error, DomainError) and (error.code in _AWAY or error.reason == DISK_FULL)


_CLASS_OF_CODE: dict[int, type[DomainError]] = {
    kind.code.value[0]: kind
    for kind in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        ResourceExhausted,
        OutOfRange,
        PermissionDenied,
        Unauthenticated,
        Aborted,
        Unavailable,
        DeadlineExceeded,
        Unimplemented,
        DataLoss,
        Cancelled,
        Internal,
    )
}

# What a status without details means here; these come from gRPC itself, not from a handler. Its own text may name
# addresses and files, so it stays in the cause and in the log, and people get this sentence.
_UNTYPED: dict[grpc.StatusCode, tuple[str, str]] = {
    grpc.StatusCode.UNAVAILABLE: ("DEPENDENCY_UNAVAILABLE", "the service cannot be reached now; try again"),
    grpc.StatusCode.DEADLINE_EXCEEDED: ("DEADLINE_TOO_SHORT", "the call did not finish within its deadline"),
    grpc.StatusCode.CANCELLED: ("CANCELLED", "the call was cancelled"),
    grpc.StatusCode.UNIMPLEMENTED: ("NOT_OFFERED", "the service does not offer this method"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: ("CAPACITY_EXHAUSTED", "the service has no room for this call now"),
    grpc.StatusCode.UNAUTHENTICATED: ("API_KEY_INVALID", "the service did not accept the caller's credentials"),
    grpc.StatusCode.PERMISSION_DENIED: ("CALLER_NOT_ALLOWED", "the service does not accept this caller"),
}
_INTERNAL = ("INTERNAL", "the call failed unexpectedly")
# What grpc.aio says where a stream's answer came, or its connection ended, while a request was being written; it puts
# that in the place of the status that came (grpc/grpc issue 36066).
_BROKEN_WRITE = "Internal error from Core"
_OVERSIZE = re.compile(r"message larger than max \((\d+) vs\. (\d+)\)")


def pack(error: DomainError) -> status_pb2.Status:
    """The status with its details, at most `DETAILS_BYTES_MAX` long: violations that do not fit are counted."""
    message = _bounded(error.message)
    status = status_pb2.Status(code=error.code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    info.metadata.update({_bounded(key): _bounded(value) for key, value in error.metadata.items()})
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        _attach(status, error_details_pb2.RetryInfo(retry_delay=delay))
    if error.violations:
        room_bytes = DETAILS_BYTES_MAX - status.ByteSize() - info.ByteSize() - 256
        bad = _fitting(error.violations, room_bytes)
        omitted = len(error.violations) - len(bad.field_violations)
        if omitted:
            info.metadata["violations_omitted"] = str(omitted)
        _attach(status, bad)
    _attach(status, info)
    return status


def unpack(error: grpc.aio.AioRpcError) -> DomainError:
    """The error as its first raiser made it; a status without details becomes the nearest typed error."""
    status = _status_of(error)
    if status is None:
        return _untyped(error)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    retry_after_s = None
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
        elif detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    if info.domain != DOMAIN:
        return _untyped(error)
    kind = _CLASS_OF_CODE.get(status.code, Internal)
    return kind(
        info.reason,
        status.message,
        violations=[FieldViolation(violation.field, violation.description) for violation in bad.field_violations],
        metadata=dict(info.metadata),
        retry_after_s=retry_after_s,
    )


def _untyped(error: grpc.aio.AioRpcError) -> DomainError:
    code = error.code()
    oversize = _OVERSIZE.search(error.details() or "")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and oversize:
        size, limit = oversize.groups()
        return ResourceExhausted(
            "SIZE_LIMIT",
            f"the message has {size} bytes and the limit is {limit}; send less at a time",
            metadata={"limit": "message_size_bytes_max", "limit_bytes": limit, "size_bytes": size},
        )
    if code is grpc.StatusCode.INTERNAL and _BROKEN_WRITE in (error.details() or ""):
        code = grpc.StatusCode.UNAVAILABLE
    if code not in _UNTYPED:
        return Internal(*_INTERNAL)
    return _CLASS_OF_CODE[code.value[0]](*_UNTYPED[code])


def _status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _attach(status: status_pb2.Status, detail: object) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)  # type: ignore[arg-type]
    status.details.append(packed)


def _fitting(violations: Sequence[FieldViolation], room_bytes: int) -> error_details_pb2.BadRequest:
    bad = error_details_pb2.BadRequest()
    for violation in violations:
        field, description = _bounded(violation.field), _bounded(violation.description)
        room_bytes -= len(field.encode()) + len(description.encode()) + 12
        if room_bytes < 0:
            break
        bad.field_violations.add(field=field, description=description)
    return bad


def _bounded(text: str) -> str:
    """What a message can hold of it: half of a surrogate pair, as JSON may bring it, becomes a question mark."""
    coded = text.encode(errors="replace")
    return coded.decode() if len(coded) <= TEXT_BYTES_MAX else coded[: TEXT_BYTES_MAX - 3].decode(errors="ignore") + "…"

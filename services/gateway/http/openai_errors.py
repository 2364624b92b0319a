"""Typed errors in the shape that OpenAI's clients read. Not pure: status codes of gRPC.

A body is `{"error": {message, type, param, code}}`, and the status is one of HTTP's.
"""

import math
from typing import Any

import grpc
import structlog
from starlette.responses import JSONResponse

from chassis.errors import DomainError, FieldViolation, Internal, InvalidArgument, invalid
from chassis.rpc.untyped_errors import domain_error_of
from chassis.telemetry import trace as telemetry
from formats.row_errors import RowErrors

_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    # Not 501: clients repeat what a server of the 500s refuses.
    grpc.StatusCode.UNIMPLEMENTED: 404,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
# Where the reason says more than the code; a lack of money is neither a wrong key nor something to retry.
_STATUS_OF_REASON = {
    "SIZE_LIMIT": 413,
    "BALANCE_INSUFFICIENT": 402,
    "SPEND_CAP_EXCEEDED": 402,
    "MODEL_UNKNOWN": 404,
    "DISK_FULL": 507,
}
_TYPE = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# The codes that programs written for OpenAI switch on; all others are our reason in lower case.
_CODE = {
    "API_KEY_MISSING": "invalid_api_key",
    "API_KEY_INVALID": "invalid_api_key",
    "API_KEY_REVOKED": "invalid_api_key",
    "MODEL_UNKNOWN": "model_not_found",
    "CONTEXT_TOO_LONG": "context_length_exceeded",
    "RATE_LIMITED": "rate_limit_exceeded",
    "BALANCE_INSUFFICIENT": "insufficient_quota",
    "SPEND_CAP_EXCEEDED": "billing_hard_limit_reached",
}
# Fields of the mesh's request -> parameters of the HTTP request.
_PARAMS = {
    "output_tokens_max": "max_tokens",
    "output_tokens_min": "min_tokens",
    "choices": "n",
    "enable_thinking": "chat_template_kwargs.enable_thinking",
}
log = structlog.get_logger()


def error_response(error: DomainError) -> JSONResponse:
    headers = {"x-request-id": telemetry.current_trace_id()}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    status = status_of(error)
    if status in (402, 409):
        # OpenAI's client repeats a 409 by itself; here a repetition meets the same answer.
        headers["x-should-retry"] = "false"
    return JSONResponse(error_body(error), status_code=status, headers=headers)


def error_body(error: DomainError) -> dict[str, Any]:
    status = status_of(error)
    kind = _TYPE.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = _param(error.violations[0].field) if error.violations else None
    code = _CODE.get(error.reason, error.reason.lower())
    return {"error": {"message": error.message, "type": kind, "param": param, "code": code}}


def status_of(error: DomainError) -> int:
    return _STATUS_OF_REASON.get(error.reason) or _STATUS.get(error.code, 500)


def bad_param(param: str, description: str) -> InvalidArgument:
    return invalid(param, description, message=f"{param}: {description}")


def bad_params(errors: RowErrors) -> InvalidArgument:
    """What the readers of `formats` found wrong, by its paths."""
    violations = [FieldViolation(error.path, f"expected {error.verdict}") for error in errors.kept]
    first = violations[0]
    return InvalidArgument("INVALID_FIELD", f"{first.field}: {first.description}", violations=violations)


def typed_error(error: Exception, path: str) -> DomainError:
    """What callers may see of any failure; a defect is logged with the route on which it came."""
    typed = domain_error_of(error, telemetry.current_trace_id())
    if isinstance(typed, Internal):
        log.error("request_failed", path=path, exc_info=error)
    return typed


def _param(field: str) -> str:
    # A tool is its declaration here.
    name = field.removeprefix("sampling.").removesuffix(".declaration")
    return _PARAMS.get(name, name)

"""Whose word a failed call is: the mesh packs details into its errors, and gRPC does not into its own."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from finemesh_client.errors import STATUS_DETAILS_KEY, Internal, TimedOut, Unavailable, from_rpc_error


def failed(code: grpc.StatusCode, reason: str = "") -> grpc.aio.AioRpcError:
    """As grpc.aio raises it; with a reason as the mesh packs it."""
    trailing = grpc.aio.Metadata()
    if reason:
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="finemesh"))
        packed = status_pb2.Status(code=code.value[0], message="as packed", details=[detail])
        trailing = grpc.aio.Metadata((STATUS_DETAILS_KEY, packed.SerializeToString()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details="Internal error from Core")


def test_a_connection_that_broke_may_be_tried_again() -> None:
    for code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        error = from_rpc_error(failed(code))
        assert (type(error), error.reason) == (Unavailable, "DEPENDENCY_UNAVAILABLE")
        assert error.message == "Internal error from Core"


def test_what_the_mesh_calls_internal_stays_internal() -> None:
    error = from_rpc_error(failed(grpc.StatusCode.INTERNAL, "INTERNAL"))
    assert (type(error), error.reason, error.message) == (Internal, "INTERNAL", "as packed")


def test_other_codes_keep_their_meaning_without_details() -> None:
    assert isinstance(from_rpc_error(failed(grpc.StatusCode.DEADLINE_EXCEEDED)), TimedOut)

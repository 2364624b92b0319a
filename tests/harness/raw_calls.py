"""Calls without generated code: bytes go in as they are and bytes come out. It knows no contract."""

import grpc


def raw_call(channel: grpc.aio.Channel, method: str) -> "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]":
    """The callable of one unary method, named as on the wire: `/package.Service/Method`."""
    return channel.unary_unary(method)

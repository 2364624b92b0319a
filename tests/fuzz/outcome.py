"""Judges how a call or a request ended: whatever was sent, the answer is typed and says nothing of our insides."""

import re
from typing import Any

import grpc

from chassis.errors import DomainError, unpack

# What gRPC's client says, here our own, when an answer comes while it still sends; the server has said something else.
BROKEN_WRITE = "Internal error from Core"
# The mistakes of a test that knocks at the wrong door: what it sends has to reach the handler.
NOT_REACHED = frozenset({"API_KEY_MISSING", "API_KEY_INVALID", "API_KEY_REVOKED", "CALLER_NOT_ALLOWED", "NOT_OFFERED"})
DEFECTS = frozenset({"INTERNAL", "UNKNOWN"})
# Classes and modules of Python, traces, addresses of objects, and paths of this machine.
_INSIDES = re.compile(
    r"<class |<built-in|Traceback|object at 0x|\b[A-Za-z_]*(?:Exception|(?<![A-Za-z ])Error)\b\(?|asyncpg|protobuf\.|"
    r"site-packages|\.py\b|(?:/home|/root|/tmp|/usr|/work|/var)/|NoneType|codec can't"
)


def ending(error: BaseException) -> DomainError:
    if isinstance(error, DomainError):
        return error
    assert isinstance(error, grpc.aio.AioRpcError), error
    return unpack(error)


def judge(error: BaseException, sent: Any) -> None:
    typed = ending(error)
    told = error.details() if isinstance(error, grpc.aio.AioRpcError) else typed.message
    code = error.code().name if isinstance(error, grpc.aio.AioRpcError) else typed.code.name
    if told == BROKEN_WRITE:
        return
    assert code not in DEFECTS, f"{code}: {told}\nsent: {sent!r}"
    assert typed.reason not in NOT_REACHED, f"{typed}\nsent: {sent!r}"
    assert typed.reason != "INTERNAL", f"{typed}\nsent: {sent!r}"
    judge_text(f"{told}\n{[violation.description for violation in typed.violations]}", sent)


def judge_text(text: str, sent: Any) -> None:
    # What was sent comes back in some messages.
    found = _INSIDES.search(text)
    assert found is None or found[0] in str(sent), f"{found and found[0]!r} in: {text}\nsent: {sent!r}"

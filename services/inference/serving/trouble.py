"""Says which errors mean that something is away for a while and may be back later. Not pure: database."""

from __future__ import annotations

from chassis.db.pool import database_is_away
from chassis.errors import DomainError, Internal, is_away

ENGINE_FAILED = "ENGINE_FAILED"


def is_passing(error: Exception) -> bool:
    """Whether a keeper of endpoints, models or states tries again: a peer, the store or the database is away or slow.

    An engine that fails to start is Unavailable to a caller, who may come back, and a fact to its keeper. A peer's
    INTERNAL says nothing about what it was asked.
    """
    if isinstance(error, DomainError):
        return (is_away(error) or isinstance(error, Internal)) and error.reason != ENGINE_FAILED
    return database_is_away(error)

"""The async Python client of finemesh: typed calls over the public gRPC API. It stands on the contracts alone."""

from finemesh_client.client import Client
from finemesh_client.config import ClientConfig, find_config
from finemesh_client.errors import (
    AlreadyExists,
    BalanceInsufficient,
    Cancelled,
    Conflict,
    DataLoss,
    FinemeshError,
    Internal,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RateLimited,
    TimedOut,
    Unauthenticated,
    Unavailable,
    Violation,
)

__all__ = [
    "AlreadyExists",
    "BalanceInsufficient",
    "Cancelled",
    "Client",
    "ClientConfig",
    "Conflict",
    "DataLoss",
    "FinemeshError",
    "Internal",
    "InvalidRequest",
    "NotFound",
    "PermissionDenied",
    "RateLimited",
    "TimedOut",
    "Unauthenticated",
    "Unavailable",
    "Violation",
    "find_config",
]

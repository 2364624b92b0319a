"""What an exception that nobody typed means at the edge of a call: a full disk, a lost
dependency, or our own mistake.

It tells the caller as little as possible: the detail belongs in the log, under the trace id.
"""

import grpc

from chassis.db.pool import database_is_full, database_is_in_trouble
from chassis.errors import DomainError, Internal, Unavailable, disk_full, is_disk_full, unpack


def domain_error_of(error: Exception, trace_id: str) -> DomainError:
    """The typed error that travels instead of `error`."""
    if isinstance(error, DomainError):
        return error
    if isinstance(error, grpc.aio.AioRpcError):
        return unpack(error)
    if database_is_full(error):
        return disk_full("the disk of the database")
    if is_disk_full(error):
        return disk_full("a disk of the service")
    if is_lost_dependency(error):
        return Unavailable("DEPENDENCY_UNAVAILABLE", "a part that this call needs cannot be reached now; try again")
    return Internal("INTERNAL", f"unexpected failure; the log has the details under trace {trace_id}")


def is_lost_dependency(error: BaseException) -> bool:
    """Whether trying again later may help. A plain OSError is what several refused addresses at once look like;
    its other subclasses (a missing file, a permission) are mistakes that waiting does not mend."""
    return isinstance(error, ConnectionError | TimeoutError) or type(error) is OSError or database_is_in_trouble(error)

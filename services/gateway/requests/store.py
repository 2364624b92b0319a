"""Reads and writes the audit log and what request_ids made. It decides nothing."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from chassis.identity import Caller

QUERIES = load_queries(Path(__file__).parent / "queries.sql")


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """What an earlier request with the same request_id was and made."""

    fingerprint: bytes
    resource_id: str


class RequestStore:
    """Traces of requests over one connection, inside the caller's transaction if there is one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def claim(
        self,
        *,
        project_id: str,
        method: str,
        request_id: str,
        fingerprint: bytes,
        resource_id: str,
        now: datetime,
    ) -> bool:
        """False when the request_id was used before, or a moment ago by a transaction that committed first."""
        status = await QUERIES.add_idempotency(
            self._connection,
            project_id=project_id,
            method=method,
            request_id=request_id,
            fingerprint=fingerprint,
            resource_id=resource_id,
            create_time=now,
        )
        return affected(status) == 1

    async def repeated(self, project_id: str, method: str, request_id: str) -> Repeated | None:
        row = await QUERIES.get_idempotency(
            self._connection, project_id=project_id, method=method, request_id=request_id
        )
        if row is None:
            return None
        return Repeated(fingerprint=bytes(row["fingerprint"]), resource_id=row["resource_id"])

    async def prune(self, retention_s: float, batch_max: int) -> int:
        """Forgets the oldest request_ids past keeping, at most so many; returns how many."""
        return affected(await QUERIES.prune_idempotency(self._connection, retention_s=retention_s, batch_max=batch_max))

    async def prune_audit_log(self, retention_s: float, batch_max: int) -> int:
        """As `prune`, for entries of the audit log."""
        return affected(await QUERIES.prune_audit_log(self._connection, retention_s=retention_s, batch_max=batch_max))

    async def add_audit_entry(
        self, caller: Caller, *, now: datetime, action: str, resource: str, trace_id: str, outcome: str
    ) -> int:
        """Id of the entry; an empty `outcome` is not known yet."""
        entry_id: int = await QUERIES.add_audit_entry(
            self._connection,
            create_time=now,
            organization_id=caller.account,
            project_id=caller.tenant,
            actor=caller.subject,
            roles=sorted(caller.roles),
            action=action,
            resource=resource,
            trace_id=trace_id,
            outcome=outcome,
        )
        return entry_id

    async def end_audit_entry(self, entry_id: int, *, resource: str, outcome: str) -> None:
        await QUERIES.end_audit_entry(self._connection, entry_id=entry_id, resource=resource, outcome=outcome)

"""Writes the audit log: who did what, in the transaction of the deed itself. Not pure: database."""

from datetime import datetime

from chassis.db.pool import Connection
from chassis.identity import Caller
from chassis.telemetry import trace as telemetry
from services.gateway.requests.store import RequestStore


async def record(connection: Connection, caller: Caller, now: datetime, action: str, resource: str) -> None:
    """`action` such as `key.create`; `resource` is a resource name."""
    await RequestStore(connection).add_audit_entry(
        now=now,
        organization_id=caller.account,
        project_id=caller.tenant,
        actor=caller.subject,
        action=action,
        resource=resource,
        trace_id=telemetry.current_trace_id(),
    )

"""Writes the audit log: who did what, in the transaction of the deed itself."""

from datetime import datetime

from chassis.db.pool import Connection
from chassis.identity import Caller
from chassis.telemetry import trace as telemetry
from services.gateway.store import Store


async def record(
    store: Store, connection: Connection, caller: Caller, now: datetime, action: str, resource: str
) -> None:
    """`action` such as `key.create`; `resource` is a resource name."""
    await store.add_audit_entry(
        connection,
        now=now,
        organization_id=caller.account,
        project_id=caller.tenant,
        actor=caller.subject,
        action=action,
        resource=resource,
        trace_id=telemetry.current_trace_id(),
    )

"""Adds credit to an organization. Not pure: database."""

import uuid
from datetime import datetime

from chassis.db.pool import Connection
from chassis.errors import AlreadyExists, FieldViolation, OutOfRange
from services.billing.ledger import entries
from services.billing.ledger.entries import Account, Balances
from services.billing.ledger.store import LedgerStore
from services.billing.limits import Limits


async def add_credit(
    connection: Connection,
    *,
    organization_id: str,
    amount_nanos_usd: int,
    request_id: str,
    now: datetime,
    limits: Limits,
) -> tuple[uuid.UUID, Balances]:
    """Adds credit once per request id; the same id with another amount is REQUEST_ID_REUSED."""
    ledger = LedgerStore(connection)
    standings = await ledger.lock([organization_id])
    balances = standings[organization_id].balances
    entry = entries.top_up(
        organization_id=organization_id, amount_nanos_usd=amount_nanos_usd, request_id=request_id, now=now
    )
    before = await ledger.get_posted_amount(entry.id, Account.PREPAID)
    if before == amount_nanos_usd:
        return entry.id, balances
    if before is not None:
        raise AlreadyExists(
            "REQUEST_ID_REUSED",
            f"request_id {request_id} came before with {before} nano-dollars; use a new one",
            violations=[FieldViolation("request_id", "was used for a different request")],
        )
    if balances.available_nanos_usd + balances.held_nanos_usd + amount_nanos_usd > limits.amount_nanos_usd_max:
        raise OutOfRange(
            "INVALID_FIELD",
            f"a balance is at most {limits.amount_nanos_usd_max} nano-dollars; add less",
            violations=[FieldViolation("amount_nanos_usd", "would lift the balance over its limit")],
        )
    await ledger.post(standings, [entry])
    return entry.id, standings[organization_id].balances

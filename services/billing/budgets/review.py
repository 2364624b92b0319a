"""Announces what follows when money moved, and refuses what a month's cap leaves no room for. Not pure: database, bus.

`review_spending` runs in the transaction that posted or held, under the lock of its organizations. So each change is
announced once.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime

from chassis.bus.outbox import Outbox
from chassis.db.pool import Connection
from chassis.errors import FailedPrecondition
from services.billing.budgets import caps, credit
from services.billing.budgets.caps import Budget, CapExceeded, Spender
from services.billing.budgets.convert import (
    budget_name,
    credit_change_to_proto,
    spend_cap_to_proto,
    spend_threshold_to_proto,
)
from services.billing.budgets.store import BudgetStore
from services.billing.calendar import Month
from services.billing.prices.pricing import in_dollars


async def review_spending(
    connection: Connection,
    outbox: Outbox,
    organization_ids: Iterable[str],
    now: datetime,
    *,
    spenders: Iterable[Spender] = (),
) -> None:
    """Announces credit that became low, exhausted or sufficient, and of the spenders, whose spending or budget changed,
    caps and shares of caps that were reached.

    Costs one query, and one more for organizations that have budgets. It reads the budgets of the spenders and of their
    projects, however many others there are.
    """
    store = BudgetStore(connection)
    reviewed = await store.list_credit(organization_ids)
    changes = [change for each in reviewed if (change := credit.change_of(each.credit)) is not None]
    if changes:
        await store.save_credit_changes(changes)
        for change in changes:
            event = credit_change_to_proto(change, now)
            await outbox.add(connection, event, subject_name=f"organizations/{change.organization_id}")
    with_budgets = [each.credit.organization_id for each in reviewed if each.has_budgets]
    touched = _with_projects(spenders)
    if with_budgets and touched:
        month = Month.of(now)
        budgets = await store.list_budgets(with_budgets, touched, month.first_day)
        await _announce_shares(connection, outbox, budgets, month, now)
        await _announce_caps(connection, outbox, budgets, month, now)


async def refuse_over_cap(
    connection: Connection,
    *,
    organization_id: str,
    project_id: str,
    api_key_id: str,
    required_nanos_usd: int,
    leased_nanos_usd: Mapping[Spender, int],
    now: datetime,
) -> None:
    """SPEND_CAP_EXCEEDED when the cap of the project or of the key leaves less room beside what calls may still use.

    The organization must be locked.
    """
    budgets = await budgets_of(connection, organization_id, Spender(project_id, api_key_id), now)
    try:
        caps.check(budgets, required_nanos_usd, leased_nanos_usd)
    except CapExceeded as error:
        raise cap_exceeded(error, Month.of(now), what="the job") from error


async def budgets_of(connection: Connection, organization_id: str, spender: Spender, now: datetime) -> list[Budget]:
    """The budgets of this month that bound a spender: the project's, and the key's own."""
    touched = _with_projects([spender])
    return await BudgetStore(connection).list_budgets([organization_id], touched, Month.of(now).first_day)


def cap_exceeded(error: CapExceeded, month: Month, *, what: str) -> FailedPrecondition:
    """The typed error; `what` needs more than the cap leaves."""
    budget = error.budget
    whose = f"API key {budget.api_key_id}" if budget.api_key_id else "the project"
    return FailedPrecondition(
        "SPEND_CAP_EXCEEDED",
        f"{what} needs {in_dollars(error.required_nanos_usd)} USD, but {whose} has spent or holds"
        f" {in_dollars(budget.monthly_cap_nanos_usd - error.room_nanos_usd)} of the"
        f" {in_dollars(budget.monthly_cap_nanos_usd)} USD that it may spend in {month}: raise the cap, or wait for the"
        " next month",
        metadata={
            "cap_nanos_usd": str(budget.monthly_cap_nanos_usd),
            "spent_nanos_usd": str(budget.spent_nanos_usd),
            "required_nanos_usd": str(error.required_nanos_usd),
            "available_nanos_usd": str(error.room_nanos_usd),
            "shortfall_nanos_usd": str(error.required_nanos_usd - error.room_nanos_usd),
            "api_key_id": budget.api_key_id,
            "month": str(month),
            "until_time": month.end.isoformat(),
        },
    )


def _with_projects(spenders: Iterable[Spender]) -> set[Spender]:
    """What a key spends, its project spends."""
    return {whose for spender in spenders for whose in (spender, Spender(spender.project_id))}


async def _announce_shares(
    connection: Connection, outbox: Outbox, budgets: Sequence[Budget], month: Month, now: datetime
) -> None:
    reached = [(budget, percent) for budget in budgets for percent in caps.percents_reached(budget)]
    if not reached:
        return
    new = await BudgetStore(connection).add_alerts(reached, month.first_day, now)
    for budget, percent in reached:
        if (budget.project_id, budget.api_key_id, percent) in new:
            event = spend_threshold_to_proto(budget, percent, month, now)
            await outbox.add(connection, event, subject_name=budget_name(budget))


async def _announce_caps(
    connection: Connection, outbox: Outbox, budgets: Sequence[Budget], month: Month, now: datetime
) -> None:
    start: date = month.first_day
    changed = [budget for budget in budgets if caps.cap_state_changed(budget, start)]
    if not changed:
        return
    await BudgetStore(connection).save_cap_states(changed, start)
    for budget in changed:
        event = spend_cap_to_proto(budget, month, now)
        await outbox.add(connection, event, subject_name=budget_name(budget))

"""Between the contracts of budgets and credit and the domain; it decides nothing."""

from datetime import datetime

from chassis.names import format_name
from finemesh.billing.v1 import budget_service_pb2
from finemesh.events.v1 import billing_events_pb2
from services.billing.caps import Budget
from services.billing.convert import to_timestamp
from services.billing.credit import CreditChange
from services.billing.invoice import Month
from services.billing.records import Hold

# The id of a project's own budget; a key's budget has the id of the key.
WHOLE_PROJECT = "project"


def budget_name(budget: Budget) -> str:
    return format_name(budget_service_pb2.Budget, project=budget.project_id, budget=budget.api_key_id or WHOLE_PROJECT)


def to_budget(budget: Budget, month: Month) -> budget_service_pb2.Budget:
    return budget_service_pb2.Budget(
        name=budget_name(budget),
        api_key_id=budget.api_key_id,
        monthly_cap_nanos_usd=budget.monthly_cap_nanos_usd,
        alert_percents=budget.alert_percents,
        spent_nanos_usd=budget.spent_nanos_usd,
        capped=budget.capped,
        month=str(month),
        update_time=to_timestamp(budget.update_time),
    )


def to_credit_event(change: CreditChange, now: datetime) -> billing_events_pb2.CreditStateChanged:
    return billing_events_pb2.CreditStateChanged(
        organization_id=change.organization_id,
        from_state=change.from_state or "",
        to_state=change.to_state,
        available_nanos_usd=change.balances.available_nanos_usd,
        owed_nanos_usd=change.balances.owed_nanos_usd,
        revision=change.revision,
        event_time=to_timestamp(now),
    )


def to_threshold_event(
    budget: Budget, percent: int, month: Month, now: datetime
) -> billing_events_pb2.SpendThresholdReached:
    return billing_events_pb2.SpendThresholdReached(
        organization_id=budget.organization_id,
        project_id=budget.project_id,
        api_key_id=budget.api_key_id,
        month=str(month),
        percent=percent,
        spent_nanos_usd=budget.spent_nanos_usd,
        cap_nanos_usd=budget.monthly_cap_nanos_usd,
        event_time=to_timestamp(now),
    )


def to_cap_event(budget: Budget, month: Month, now: datetime) -> billing_events_pb2.SpendCapStateChanged:
    return billing_events_pb2.SpendCapStateChanged(
        organization_id=budget.organization_id,
        project_id=budget.project_id,
        api_key_id=budget.api_key_id,
        capped=budget.capped,
        until_time=to_timestamp(month.end),
        spent_nanos_usd=budget.spent_nanos_usd,
        cap_nanos_usd=budget.monthly_cap_nanos_usd,
        revision=budget.revision + 1,
        event_time=to_timestamp(now),
    )


def to_expired_event(hold: Hold, now: datetime) -> billing_events_pb2.HoldExpired:
    return billing_events_pb2.HoldExpired(
        resource=hold.resource,
        project_id=hold.project_id,
        organization_id=hold.organization_id,
        released_nanos_usd=hold.held_nanos_usd,
        event_time=to_timestamp(now),
    )

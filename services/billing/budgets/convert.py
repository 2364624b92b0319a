"""The names of budgets, and the events that announce credit and spending, as messages. It decides nothing."""

from datetime import datetime

from chassis.names import format_name
from chassis.timestamps import time_to_proto
from finemesh.billing.v1 import budget_service_pb2
from finemesh.events.v1 import billing_events_pb2
from services.billing.budgets.caps import Budget
from services.billing.budgets.credit import CreditChange
from services.billing.calendar import Month

# The id of a project's own budget; a key's budget has the id of the key.
WHOLE_PROJECT = "project"


def budget_name(budget: Budget) -> str:
    return format_name(budget_service_pb2.Budget, project=budget.project_id, budget=budget.api_key_id or WHOLE_PROJECT)


def credit_change_to_proto(change: CreditChange, now: datetime) -> billing_events_pb2.CreditStateChanged:
    return billing_events_pb2.CreditStateChanged(
        organization_id=change.organization_id,
        from_state=change.from_state or "",
        to_state=change.to_state,
        available_nanos_usd=change.balances.available_nanos_usd,
        owed_nanos_usd=change.balances.owed_nanos_usd,
        revision=change.revision,
        event_time=time_to_proto(now),
    )


def spend_threshold_to_proto(
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
        event_time=time_to_proto(now),
    )


def spend_cap_to_proto(budget: Budget, month: Month, now: datetime) -> billing_events_pb2.SpendCapStateChanged:
    return billing_events_pb2.SpendCapStateChanged(
        organization_id=budget.organization_id,
        project_id=budget.project_id,
        api_key_id=budget.api_key_id,
        capped=budget.capped,
        until_time=time_to_proto(month.end),
        spent_nanos_usd=budget.spent_nanos_usd,
        cap_nanos_usd=budget.monthly_cap_nanos_usd,
        revision=budget.revision + 1,
        event_time=time_to_proto(now),
    )

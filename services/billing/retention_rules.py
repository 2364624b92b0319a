"""Not pure: database. Which rows of billing go when. The ledger and what proves it stay for ever."""

from chassis.retention import RetentionRule
from services.billing.budgets.store import BudgetStore
from services.billing.config import BillingSettings


def retention_rules(settings: BillingSettings) -> list[RetentionRule]:
    return [
        RetentionRule(
            name="budget_alerts",
            delete=lambda connection, batch_max: BudgetStore(connection).prune_alerts(
                settings.budget_alert_retention_s, batch_max
            ),
        ),
    ]

"""Credit states and budgets in the database. It decides nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from services.billing.budgets.caps import Budget, Spender
from services.billing.budgets.credit import Credit, CreditChange, CreditState
from services.billing.ledger.entries import Balances

_queries = load_queries(Path(__file__).parent / "queries.sql")


@dataclass(frozen=True, kw_only=True)
class Reviewed:
    """An organization that has entries; `has_budgets` says whether its caps are worth a look."""

    credit: Credit
    has_budgets: bool


class BudgetStore:
    """Budgets, and what was announced of them and of credit."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def list_credit(self, organization_ids: Iterable[str]) -> list[Reviewed]:
        """Without organizations whose ledger is empty."""
        rows = _queries.list_credit(self._connection, organization_ids=sorted(set(organization_ids)))
        return [
            Reviewed(
                credit=Credit(
                    organization_id=row["organization_id"],
                    balances=Balances(
                        prepaid_nanos_usd=row["prepaid_nanos_usd"],
                        held_nanos_usd=row["held_nanos_usd"],
                        receivable_nanos_usd=row["receivable_nanos_usd"],
                    ),
                    low_balance_nanos_usd=row["low_balance_nanos_usd"],
                    state=CreditState(row["state"]) if row["state"] else None,
                    revision=row["revision"],
                ),
                has_budgets=row["has_budgets"],
            )
            async for row in rows
        ]

    async def save_credit_changes(self, changes: Sequence[CreditChange]) -> None:
        await _queries.save_credit_states(
            self._connection,
            organization_ids=[change.organization_id for change in changes],
            states=[change.to_state for change in changes],
            revisions=[change.revision for change in changes],
        )

    async def set_low_balance(self, organization_id: str, low_balance_nanos_usd: int) -> None:
        await _queries.set_low_balance(
            self._connection, organization_id=organization_id, low_balance_nanos_usd=low_balance_nanos_usd
        )

    async def get_low_balance(self, organization_id: str) -> int:
        return await _queries.get_low_balance(self._connection, organization_id=organization_id) or 0

    async def list_budget_keys(self, organization_id: str, project_id: str) -> list[str]:
        """Whose budgets a project has, its own as an empty key, without those that were removed."""
        rows = _queries.list_budget_keys(self._connection, organization_id=organization_id, project_id=project_id)
        return [row["api_key_id"] async for row in rows]

    async def list_budgets(
        self, organization_ids: Iterable[str], spenders: Iterable[Spender], month: date
    ) -> list[Budget]:
        """The spenders' own budgets with what is spent in the month, a project's before those of its keys.

        A budget that was removed is among them while its cap is still announced.
        """
        named = sorted(set(spenders))
        rows = _queries.list_budgets(
            self._connection,
            organization_ids=sorted(set(organization_ids)),
            project_ids=[spender.project_id for spender in named],
            api_key_ids=[spender.api_key_id for spender in named],
            month=month,
        )
        return [_budget(row) async for row in rows]

    async def set_budget(
        self,
        *,
        organization_id: str,
        project_id: str,
        api_key_id: str,
        monthly_cap_nanos_usd: int,
        alert_percents: Sequence[int],
        now: datetime,
    ) -> None:
        await _queries.set_budget(
            self._connection,
            project_id=project_id,
            api_key_id=api_key_id,
            organization_id=organization_id,
            monthly_cap_nanos_usd=monthly_cap_nanos_usd,
            alert_percents=list(alert_percents),
            now=now,
        )

    async def remove_budget(self, project_id: str, api_key_id: str, now: datetime) -> None:
        await _queries.remove_budget(self._connection, project_id=project_id, api_key_id=api_key_id, now=now)

    async def save_cap_states(self, budgets: Sequence[Budget], month: date) -> None:
        """Remembers that these budgets are announced as they are now, each with its next revision."""
        await _queries.save_cap_states(
            self._connection,
            project_ids=[budget.project_id for budget in budgets],
            api_key_ids=[budget.api_key_id for budget in budgets],
            capped_months=[month if budget.capped else None for budget in budgets],
            capped_at=[budget.monthly_cap_nanos_usd if budget.capped else 0 for budget in budgets],
            revisions=[budget.revision + 1 for budget in budgets],
        )

    async def add_alerts(
        self, reached: Sequence[tuple[Budget, int]], month: date, now: datetime
    ) -> set[tuple[str, str, int]]:
        """(project, key, percent) of the warnings that did not go out before."""
        rows = _queries.add_alerts(
            self._connection,
            project_ids=[budget.project_id for budget, _ in reached],
            api_key_ids=[budget.api_key_id for budget, _ in reached],
            percents=[percent for _, percent in reached],
            month=month,
            now=now,
        )
        return {(row["project_id"], row["api_key_id"], row["percent"]) async for row in rows}

    async def prune_alerts(self, retention_s: float, batch_max: int) -> int:
        """Forgets warnings of long ago, at most so many; returns how many."""
        return affected(await _queries.prune_alerts(self._connection, retention_s=retention_s, batch_max=batch_max))


def _budget(row: Any) -> Budget:
    return Budget(**{**row, "alert_percents": tuple(row["alert_percents"])})

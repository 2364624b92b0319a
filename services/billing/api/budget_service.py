"""BudgetService: monthly spend caps of the caller's own project and its keys, and the warning of a low balance."""

import re
from typing import Any

from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction
from chassis.errors import FieldViolation, PermissionDenied, ResourceExhausted, invalid, refuse_invalid
from chassis.identity import Caller, current_caller
from chassis.names import own_name, own_parent
from finemesh.billing.v1 import budget_service_pb2 as pb
from finemesh.billing.v1 import budget_service_pb2_grpc
from finemesh.identity.v1 import identity_pb2
from services.billing.api.convert import budget_to_proto
from services.billing.budgets import caps
from services.billing.budgets.caps import Spender
from services.billing.budgets.convert import WHOLE_PROJECT
from services.billing.budgets.review import review_spending
from services.billing.budgets.store import BudgetStore
from services.billing.calendar import Month
from services.billing.config import BillingSettings
from services.billing.leasing.store import LeaseStore
from services.billing.ledger.store import LedgerStore

BUDGET_ROLE = "admin"
# A key that does not exist cannot be told from one that spends nothing: keys belong to the gateway.
_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class BudgetService(budget_service_pb2_grpc.BudgetServiceServicer):
    def __init__(self, pool: Pool, settings: BillingSettings, outbox: Outbox, *, clock: Clock) -> None:
        self._pool = pool
        self._settings = settings
        self._outbox = outbox
        self._clock = clock

    async def SetBudget(self, request: pb.SetBudgetRequest, context: Any) -> pb.SetBudgetResponse:
        caller = _admin()
        project_id = own_parent(identity_pb2.Project, request.parent, caller)["project"]
        percents = list(request.alert_percents) or list(caps.ALERT_PERCENTS_DEFAULT)
        self._check(request, percents)
        now = self._clock.now()
        month = Month.of(now)
        async with transaction(self._pool) as connection:
            await LedgerStore(connection).lock([caller.account])
            await self._check_room(connection, caller.account, project_id, request.api_key_id)
            await BudgetStore(connection).set_budget(
                organization_id=caller.account,
                project_id=project_id,
                api_key_id=request.api_key_id,
                monthly_cap_nanos_usd=request.monthly_cap_nanos_usd,
                alert_percents=percents,
                now=now,
            )
            whose = [Spender(project_id, request.api_key_id)]
            await review_spending(connection, self._outbox, [caller.account], now, spenders=whose)
            # A cap that was lowered binds what calls have not reserved yet.
            await LeaseStore(connection).recall(caller.account)
            (made,) = await BudgetStore(connection).list_budgets([caller.account], whose, month.first_day)
        self._outbox.wake()
        return pb.SetBudgetResponse(budget=budget_to_proto(made, month))

    async def ListBudgets(self, request: pb.ListBudgetsRequest, context: Any) -> pb.ListBudgetsResponse:
        caller = _member()
        project_id = own_parent(identity_pb2.Project, request.parent, caller)["project"]
        month = Month.of(self._clock.now())
        async with self._pool.acquire() as connection:
            keys = await BudgetStore(connection).list_budget_keys(caller.account, project_id)
            spenders = [Spender(project_id, key) for key in keys]
            budgets = await BudgetStore(connection).list_budgets([caller.account], spenders, month.first_day)
        return pb.ListBudgetsResponse(budgets=[budget_to_proto(budget, month) for budget in budgets])

    async def DeleteBudget(self, request: pb.DeleteBudgetRequest, context: Any) -> pb.DeleteBudgetResponse:
        caller = _admin()
        parts = own_name(pb.Budget, request.name, caller)
        now = self._clock.now()
        api_key_id = "" if parts["budget"] == WHOLE_PROJECT else parts["budget"]
        async with transaction(self._pool) as connection:
            await LedgerStore(connection).lock([caller.account])
            await BudgetStore(connection).remove_budget(parts["project"], api_key_id, now)
            removed = [Spender(parts["project"], api_key_id)]
            await review_spending(connection, self._outbox, [caller.account], now, spenders=removed)
        self._outbox.wake()
        return pb.DeleteBudgetResponse()

    async def SetLowBalance(self, request: pb.SetLowBalanceRequest, context: Any) -> pb.SetLowBalanceResponse:
        caller = _admin()
        amount_max = self._settings.amount_nanos_usd_max
        if not 0 <= request.low_balance_nanos_usd <= amount_max:
            raise invalid("low_balance_nanos_usd", f"must be from 0 to {amount_max}")
        async with transaction(self._pool) as connection:
            await LedgerStore(connection).lock([caller.account])
            await BudgetStore(connection).set_low_balance(caller.account, request.low_balance_nanos_usd)
            await review_spending(connection, self._outbox, [caller.account], self._clock.now())
        self._outbox.wake()
        return pb.SetLowBalanceResponse(low_balance_nanos_usd=request.low_balance_nanos_usd)

    async def _check_room(self, connection: Connection, organization_id: str, project_id: str, api_key_id: str) -> None:
        keys = await BudgetStore(connection).list_budget_keys(organization_id, project_id)
        budgets_max = self._settings.budgets_max
        if len(keys) >= budgets_max and api_key_id not in keys:
            raise ResourceExhausted(
                "SIZE_LIMIT",
                f"a project has at most {budgets_max} budgets; delete one that is not needed",
                metadata={"limit": "budgets_max"},
            )

    def _check(self, request: pb.SetBudgetRequest, percents: list[int]) -> None:
        """All faulty fields at once."""
        violations = []
        amount_max = self._settings.amount_nanos_usd_max
        if request.api_key_id and (not _KEY_ID.fullmatch(request.api_key_id) or request.api_key_id == WHOLE_PROJECT):
            violations.append(FieldViolation("api_key_id", "is no id of a key; `finemesh keys list` shows them"))
        if not 1 <= request.monthly_cap_nanos_usd <= amount_max:
            violations.append(FieldViolation("monthly_cap_nanos_usd", f"must be from 1 to {amount_max}"))
        problem = caps.percents_problem(percents)
        if problem:
            violations.append(FieldViolation("alert_percents", problem))
        refuse_invalid(violations)


def _member() -> Caller:
    caller = current_caller()
    if not caller.account or not caller.tenant:
        raise PermissionDenied("CALLER_NOT_ALLOWED", "this call must be made for a project of an organization")
    return caller


def _admin() -> Caller:
    caller = _member()
    caller.require_role(BUDGET_ROLE)
    return caller

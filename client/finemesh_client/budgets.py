"""Monthly spend caps of a project and its keys, and the warning of a low balance. Amounts are in nano-dollars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from finemesh.billing.v1 import budget_service_pb2, budget_service_pb2_grpc
from finemesh_client.transport import Transport


class Budgets:
    """What the caller's project may spend in a month."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub = budget_service_pb2_grpc.BudgetServiceStub(transport.channel)

    async def set(
        self, monthly_cap_nanos_usd: int, *, api_key_id: str = "", alert_percents: Sequence[int] = ()
    ) -> budget_service_pb2.Budget:
        """Sets the cap of the project, or of one of its keys. Needs the admin role."""
        request = budget_service_pb2.SetBudgetRequest(
            api_key_id=api_key_id, monthly_cap_nanos_usd=monthly_cap_nanos_usd, alert_percents=alert_percents
        )
        answer = await self._transport.unary(self._stub.SetBudget, request, safe=True)
        return cast(budget_service_pb2.SetBudgetResponse, answer).budget

    async def list(self) -> Sequence[budget_service_pb2.Budget]:
        """The project's budget first, then those of its keys, with what is spent and held this month."""
        answer = await self._transport.unary(self._stub.ListBudgets, budget_service_pb2.ListBudgetsRequest(), safe=True)
        return list(cast(budget_service_pb2.ListBudgetsResponse, answer).budgets)

    async def delete(self, name: str) -> None:
        """Removes a budget, `projects/{project}/budgets/{budget}`. Needs the admin role."""
        request = budget_service_pb2.DeleteBudgetRequest(name=name)
        await self._transport.unary(self._stub.DeleteBudget, request, safe=True)

    async def set_low_balance(self, nanos_usd: int) -> int:
        """Sets below which available amount credit counts as low; 0 never warns. Needs the admin role."""
        request = budget_service_pb2.SetLowBalanceRequest(low_balance_nanos_usd=nanos_usd)
        answer = await self._transport.unary(self._stub.SetLowBalance, request, safe=True)
        return cast(budget_service_pb2.SetLowBalanceResponse, answer).low_balance_nanos_usd

"""BudgetService as the gateway forwards it, and what budgets, credit and expiry mean for those who call billing."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from chassis.bus.subjects import subject_of
from chassis.errors import DomainError, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from finemesh.billing.v1 import balance_pb2, billing_service_pb2
from finemesh.billing.v1 import budget_service_pb2 as pb
from finemesh.billing.v1.billing_service_pb2_grpc import BillingServiceStub
from finemesh.billing.v1.budget_service_pb2_grpc import BudgetServiceStub
from finemesh.events.v1 import billing_events_pb2
from finemesh.holds.v1.hold_service_pb2 import (
    CreateHoldRequest,
    EndHoldsRequest,
    ListOverdueHoldsRequest,
    QuoteWorkRequest,
    ReleaseHoldRequest,
    RenewHoldsRequest,
)
from tests.contract.billing.conftest import Customer, Mesh, job_price

USD = 10**9


def budgets(mesh: Mesh) -> Any:
    return BudgetServiceStub(mesh.channels["gateway"])


async def set_budget(customer: Customer, cap: int, key: str = "", percents: Sequence[int] = ()) -> pb.Budget:
    request = pb.SetBudgetRequest(api_key_id=key, monthly_cap_nanos_usd=cap, alert_percents=percents)
    with customer.calling("admin"):
        budget: pb.Budget = (await budgets(customer.mesh).SetBudget(request)).budget
    return budget


async def listed(customer: Customer) -> list[pb.Budget]:
    with customer.calling("member"):
        return list((await budgets(customer.mesh).ListBudgets(pb.ListBudgetsRequest())).budgets)


async def balance(customer: Customer) -> balance_pb2.Balance:
    with customer.calling():
        return (await customer.mesh.billing.GetBalance(billing_service_pb2.GetBalanceRequest())).balance


async def test_a_budget_is_set_listed_and_removed(customer: Customer, mesh: Mesh) -> None:
    made = await set_budget(customer, 100 * USD)
    assert made.name == f"projects/{customer.project}/budgets/project"
    assert (made.monthly_cap_nanos_usd, list(made.alert_percents)) == (100 * USD, [50, 80, 100])
    assert (made.spent_nanos_usd, made.capped, made.month) == (0, False, f"{datetime.now(UTC):%Y-%m}")
    assert made.HasField("update_time")
    for key in ("key_b", "key_a"):
        await set_budget(customer, 10 * USD, key, [25])
    found = await listed(customer)
    assert [each.api_key_id for each in found] == ["", "key_a", "key_b"]
    assert [list(each.alert_percents) for each in found] == [[50, 80, 100], [25], [25]]
    await set_budget(customer, 20 * USD, "key_b")
    with customer.calling("admin"):
        for _ in range(2):
            await budgets(mesh).DeleteBudget(pb.DeleteBudgetRequest(name=found[1].name))
    assert {each.api_key_id: each.monthly_cap_nanos_usd // USD for each in await listed(customer)} == {
        "": 100,
        "key_b": 20,
    }


async def test_roles_and_walls(customer: Customer, stranger: Customer, mesh: Mesh) -> None:
    made = await set_budget(customer, 100 * USD)
    stub = budgets(mesh)
    set_request = pb.SetBudgetRequest(monthly_cap_nanos_usd=USD)
    for call, request in (
        (stub.SetBudget, set_request),
        (stub.DeleteBudget, pb.DeleteBudgetRequest(name=made.name)),
        (stub.SetLowBalance, pb.SetLowBalanceRequest(low_balance_nanos_usd=1)),
    ):
        with customer.calling("member"), pytest.raises(PermissionDenied, match="ROLE_MISSING"):
            await call(request)
    set_request.parent = f"projects/{customer.project}"
    walled: tuple[tuple[Any, Any], ...] = (
        (stub.SetBudget, set_request),
        (stub.ListBudgets, pb.ListBudgetsRequest(parent=set_request.parent)),
        (stub.DeleteBudget, pb.DeleteBudgetRequest(name=made.name)),
    )
    for call, request in walled:
        with stranger.calling("admin"), pytest.raises(NotFound):
            await call(request)
    assert await listed(stranger) == []
    (kept,) = await listed(customer)
    assert kept.monthly_cap_nanos_usd == 100 * USD
    # Only the gateway speaks for users: not even the scheduler asks for a price or a balance in their name.
    for other in (
        BudgetServiceStub(mesh.channels["scheduler"]).ListBudgets(pb.ListBudgetsRequest()),
        BillingServiceStub(mesh.channels["scheduler"]).GetBalance(billing_service_pb2.GetBalanceRequest()),
    ):
        with customer.calling("admin"), pytest.raises(PermissionDenied, match="CALLER_NOT_ALLOWED"):
            await other


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("monthly_cap_nanos_usd", {"monthly_cap_nanos_usd": 0}),
        ("monthly_cap_nanos_usd", {"monthly_cap_nanos_usd": -1}),
        ("alert_percents", {"alert_percents": [80, 50]}),
        ("alert_percents", {"alert_percents": [101]}),
        ("alert_percents", {"alert_percents": list(range(1, 12))}),
        ("api_key_id", {"api_key_id": "a b"}),
        ("api_key_id", {"api_key_id": "project"}),
        ("parent", {"parent": "nonsense"}),
    ],
)
async def test_malformed_budgets_name_their_field(customer: Customer, field: str, changes: dict[str, Any]) -> None:
    request = pb.SetBudgetRequest(**{"monthly_cap_nanos_usd": USD, **changes})
    with customer.calling("admin"), pytest.raises(InvalidArgument) as refused:
        await budgets(customer.mesh).SetBudget(request)
    assert [violation.field for violation in refused.value.violations] == [field]
    assert await listed(customer) == []


def hold_of_a_key(customer: Customer) -> CreateHoldRequest:
    """For the customer's first job, by `key_1`: 5 USD."""
    return CreateHoldRequest(
        resource=customer.job(),
        organization_id=customer.organization,
        project_id=customer.project,
        price=job_price(),
        api_key_id="key_1",
    )


async def test_a_job_that_would_break_a_cap_is_refused_with_the_numbers(customer: Customer, mesh: Mesh) -> None:
    await customer.pay_in(100 * USD)
    await set_budget(customer, 8 * USD, "key_1")
    request = hold_of_a_key(customer)
    made = await mesh.holds.CreateHold(request)
    assert made.expire_time.ToDatetime(tzinfo=UTC) > datetime.now(UTC)
    # The same job is held once, whatever the cap is by now.
    assert await mesh.holds.CreateHold(request) == made
    request.resource = customer.job(2)
    with pytest.raises(FailedPrecondition) as refused:
        await mesh.holds.CreateHold(request)
    assert refused.value.reason == "SPEND_CAP_EXCEEDED"
    assert "needs 5.00 USD" in refused.value.message
    assert "5.00 of the 8.00 USD" in refused.value.message
    assert "raise the cap" in refused.value.message
    numbers = {
        key: int(refused.value.metadata[key]) for key in ("cap_nanos_usd", "spent_nanos_usd", "required_nanos_usd")
    }
    assert numbers == {"cap_nanos_usd": 8 * USD, "spent_nanos_usd": 5 * USD, "required_nanos_usd": 5 * USD}
    assert (await balance(customer)).held_nanos_usd == 5 * USD
    request.api_key_id = "key_2"
    await mesh.holds.CreateHold(request)
    (budget,) = await listed(customer)
    assert budget.spent_nanos_usd == 5 * USD


async def test_a_hold_and_its_release_move_the_cap_of_their_key(customer: Customer, mesh: Mesh) -> None:
    await customer.pay_in(100 * USD)
    await set_budget(customer, 5 * USD, "key_1")
    await mesh.holds.CreateHold(hold_of_a_key(customer))
    await mesh.holds.ReleaseHold(ReleaseHoldRequest(resource=customer.job()))
    rows = await mesh.pool.fetch(
        "SELECT payload FROM outbox WHERE subject = $1 AND headers ->> 'ce-subject' = $2 ORDER BY created_at",
        subject_of(billing_events_pb2.SpendCapStateChanged),
        f"projects/{customer.project}/budgets/key_1",
    )
    events = [billing_events_pb2.SpendCapStateChanged.FromString(row["payload"]) for row in rows]
    assert [(event.capped, event.revision) for event in events] == [(True, 1), (False, 2)]


async def test_the_balance_says_whether_credit_is_enough(customer: Customer, mesh: Mesh) -> None:
    assert (await balance(customer)).credit_state == balance_pb2.CREDIT_STATE_EXHAUSTED
    await customer.pay_in(6 * USD)
    with customer.calling("admin"):
        request = pb.SetLowBalanceRequest(low_balance_nanos_usd=2 * USD)
        assert (await budgets(mesh).SetLowBalance(request)).low_balance_nanos_usd == 2 * USD
        with pytest.raises(InvalidArgument):
            await budgets(mesh).SetLowBalance(pb.SetLowBalanceRequest(low_balance_nanos_usd=-1))
    found = await balance(customer)
    assert (found.credit_state, found.low_balance_nanos_usd) == (balance_pb2.CREDIT_STATE_SUFFICIENT, 2 * USD)
    await customer.hold()
    assert (await balance(customer)).credit_state == balance_pb2.CREDIT_STATE_LOW
    rows = await mesh.pool.fetch(
        "SELECT payload FROM outbox WHERE subject = 'billing.credit.state_changed' AND headers ->> 'ce-subject' = $1"
        " ORDER BY created_at",
        f"organizations/{customer.organization}",
    )
    events = [billing_events_pb2.CreditStateChanged.FromString(row["payload"]) for row in rows]
    assert [(event.to_state, event.revision) for event in events] == [("SUFFICIENT", 1), ("LOW", 2)]


async def test_a_quote_of_work_is_price_and_means_in_one(customer: Customer, mesh: Mesh) -> None:
    await customer.pay_in(7 * USD)
    answer = await mesh.holds.QuoteWork(QuoteWorkRequest(organization_id=customer.organization, price=job_price()))
    assert answer.available_nanos_usd == 7 * USD
    with customer.calling():
        assert answer.quote == await mesh.billing.EstimatePrice(job_price())
    for wrong in (
        QuoteWorkRequest(organization_id="a b", price=job_price()),
        QuoteWorkRequest(organization_id=customer.organization, price=job_price(epochs=0)),
    ):
        with pytest.raises(InvalidArgument):
            await mesh.holds.QuoteWork(wrong)


async def test_holds_are_renewed_in_bounded_numbers_and_end_when_the_scheduler_says_so(
    customer: Customer, mesh: Mesh
) -> None:
    await customer.pay_in(10 * USD)
    for number in (1, 2):
        await customer.hold(number)
    # As if a day had passed since they were made.
    await mesh.pool.execute(
        "UPDATE holds SET expire_time = now() - interval '1 hour' WHERE resource = $1", customer.job()
    )
    assert customer.job() in (await mesh.holds.ListOverdueHolds(ListOverdueHoldsRequest())).resources
    told = EndHoldsRequest(unknown_resources=[customer.job(), customer.job(2)])
    assert list((await mesh.holds.EndHolds(told)).open_resources) == [customer.job(2)]
    assert await mesh.pool.fetchval("SELECT state FROM holds WHERE resource = $1", customer.job()) == "expired"
    request = RenewHoldsRequest(resources=[customer.job(1), customer.job(2), customer.job(3)])
    answer = await mesh.holds.RenewHolds(request)
    assert sorted(answer.ended_resources) == [customer.job(1), customer.job(3)]
    assert answer.expire_time.ToDatetime(tzinfo=UTC) > datetime.now(UTC)
    assert (await balance(customer)).held_nanos_usd == 5 * USD
    with customer.calling():
        charge = await mesh.billing.GetJobCharge(billing_service_pb2.GetJobChargeRequest(tuning_job=customer.job()))
    assert (charge.settled, charge.charged_nanos_usd, charge.released_nanos_usd) == (True, 0, 5 * USD)
    with pytest.raises(DomainError, match="HOLD_EXPIRED"):
        await customer.hold(1)
    too_many = RenewHoldsRequest(resources=[customer.job(number) for number in range(1001)])
    for wrong in (too_many, RenewHoldsRequest(resources=["nonsense"])):
        with pytest.raises(InvalidArgument):
            await mesh.holds.RenewHolds(wrong)
    with pytest.raises(InvalidArgument):
        await mesh.holds.EndHolds(EndHoldsRequest(ended_resources=["nonsense"]))

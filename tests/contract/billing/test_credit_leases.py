"""CreditLeaseService as a replica of inference sees it."""

import asyncio
import uuid
from typing import Any

import pytest
import pytest_asyncio

from chassis.bus.subjects import subject_of
from chassis.errors import Aborted, FailedPrecondition, InvalidArgument, PermissionDenied
from finemesh.billing.v1.budget_service_pb2 import SetBudgetRequest
from finemesh.billing.v1.budget_service_pb2_grpc import BudgetServiceStub
from finemesh.credit.v1 import credit_lease_service_pb2 as pb
from finemesh.credit.v1.credit_lease_service_pb2_grpc import CreditLeaseServiceStub
from finemesh.events.v1.billing_events_pb2 import SpendThresholdReached as Reached
from tests.contract.billing.conftest import Customer, Mesh

MODEL = "finemesh/demo-llama"


@pytest_asyncio.fixture(loop_scope="session")
async def leases(mesh: Mesh) -> Any:
    return CreditLeaseServiceStub(mesh.channels["inference"])


@pytest_asyncio.fixture(loop_scope="session")
async def holder(leases: Any) -> str:
    name = f"replica-{uuid.uuid4().hex}"
    assert not (await leases.RenewCreditLeases(pb.RenewCreditLeasesRequest(holder=name))).known
    return name


def wish(customer: Customer, holder: str, required: int, wanted: int = 0, revision: int = 1) -> pb.GrantCreditRequest:
    return pb.GrantCreditRequest(
        holder=holder,
        lease_id=f"{holder}-1",
        organization_id=customer.organization,
        project_id=customer.project,
        api_key_id="key_1",
        revision=revision,
        required_nanos_usd=required,
        wanted_nanos_usd=wanted,
    )


async def test_a_lease_from_its_grant_to_its_end(leases: Any, holder: str, customer: Customer) -> None:
    with pytest.raises(FailedPrecondition, match="BALANCE_INSUFFICIENT") as refused:
        await leases.GrantCredit(wish(customer, holder, 1))
    assert refused.value.metadata["shortfall_nanos_usd"] == "1"
    await customer.pay_in(800)
    granted = await leases.GrantCredit(wish(customer, holder, 10, 700))
    assert granted.granted_nanos_usd == 100
    renewed = await leases.RenewCreditLeases(pb.RenewCreditLeasesRequest(holder=holder))
    assert renewed.known
    assert renewed.lease_duration.seconds > 0
    back = pb.ReturnedCredit(lease_id=f"{holder}-1", revision=2, granted_nanos_usd=0, closed=True)
    await leases.RenewCreditLeases(pb.RenewCreditLeasesRequest(holder=holder, returns=[back], leaving=True))
    with pytest.raises(Aborted, match="LEASE_STALE"):
        await leases.GrantCredit(wish(customer, holder, 10, revision=3))


async def test_a_job_gets_what_idle_leases_hold(leases: Any, holder: str, customer: Customer) -> None:
    await customer.pay_in(5 * 10**9)
    await leases.GrantCredit(wish(customer, holder, 10**9))
    job = asyncio.create_task(customer.hold())
    recalled: list[str] = []
    async with asyncio.timeout(60):
        while not recalled:
            renewed = await leases.RenewCreditLeases(pb.RenewCreditLeasesRequest(holder=holder))
            recalled = list(renewed.recalled_lease_ids)
    back = [pb.ReturnedCredit(lease_id=lease_id, revision=2) for lease_id in recalled]
    await leases.RenewCreditLeases(pb.RenewCreditLeasesRequest(holder=holder, returns=back))
    assert (await job).quote.total_nanos_usd == 5 * 10**9


async def test_a_call_that_the_cap_stops_is_told_once_a_month(
    mesh: Mesh, leases: Any, holder: str, customer: Customer
) -> None:
    """Calls stop short of a cap, so spending alone may never reach it."""
    await customer.pay_in(100 * 10**9)
    with customer.calling("admin"):
        budgets = BudgetServiceStub(mesh.channels["gateway"])
        await budgets.SetBudget(SetBudgetRequest(monthly_cap_nanos_usd=1000, alert_percents=[50]))
    for number in range(3):
        with pytest.raises(FailedPrecondition, match="SPEND_CAP_EXCEEDED"):
            await leases.GrantCredit(wish(customer, holder, 1001 + number))
    with pytest.raises(FailedPrecondition, match="SPEND_CAP_EXCEEDED"):
        await customer.hold()
    told = [
        event
        for row in await mesh.pool.fetch("SELECT payload FROM outbox WHERE subject = $1", subject_of(Reached))
        if (event := Reached.FromString(row["payload"])).organization_id == customer.organization
    ]
    assert [(event.percent, event.spent_nanos_usd, event.cap_nanos_usd) for event in told] == [(100, 0, 1000)]
    assert (told[0].refused_nanos_usd, told[0].project_id, told[0].api_key_id) == (1001, customer.project, "")


async def test_first_minutes_of_an_endpoint_have_to_be_covered(
    mesh: Mesh, leases: Any, holder: str, customer: Customer
) -> None:
    """By what leases do not hold, and of any hardware by the cheapest."""
    request = pb.CheckEndpointMinutesRequest(
        organization_id=customer.organization, project_id=customer.project, device_count=2, minutes=10
    )
    await customer.pay_in(20 * 10**6)
    assert (await leases.CheckEndpointMinutes(request)).required_nanos_usd == 20 * 10**6
    request.hardware_type = "nvidia-h100-80gb"
    with pytest.raises(FailedPrecondition, match="BALANCE_INSUFFICIENT") as refused:
        await leases.CheckEndpointMinutes(request)
    assert refused.value.metadata["shortfall_nanos_usd"] == str(20 * 56_000_000 - 20 * 10**6)
    assert "an endpoint for its first 10 minutes needs 1.12 USD" in refused.value.message
    request.hardware_type = "a-rock"
    with pytest.raises(InvalidArgument, match="PRICE_UNKNOWN"):
        await leases.CheckEndpointMinutes(request)
    request.hardware_type = "cpu"
    with customer.calling("admin"):
        budgets = BudgetServiceStub(mesh.channels["gateway"])
        await budgets.SetBudget(SetBudgetRequest(monthly_cap_nanos_usd=20 * 10**6 - 1))
    with pytest.raises(FailedPrecondition, match="SPEND_CAP_EXCEEDED") as refused:
        await leases.CheckEndpointMinutes(request)
    assert refused.value.metadata["shortfall_nanos_usd"] == "1"


async def test_the_price_is_told_for_the_hour_to_come(leases: Any) -> None:
    told = await leases.GetTokenPrice(pb.GetTokenPriceRequest(base_model=MODEL))
    assert (told.input_nanos_usd_per_million, told.output_nanos_usd_per_million) == (50_000_000, 100_000_000)
    assert told.valid_duration.seconds == 1800


async def test_only_inference_leases_and_only_what_makes_sense(
    mesh: Mesh, leases: Any, holder: str, customer: Customer
) -> None:
    foreign = CreditLeaseServiceStub(mesh.channels["scheduler"])
    with pytest.raises(PermissionDenied):
        await foreign.GrantCredit(wish(customer, holder, 1))
    with pytest.raises(InvalidArgument, match="required_nanos_usd"):
        await leases.GrantCredit(wish(customer, holder, -1))
    with pytest.raises(InvalidArgument, match="holder"):
        await leases.GrantCredit(wish(customer, "no/id", 1))
    many = [pb.ReturnedCredit(lease_id=str(number)) for number in range(1001)]
    with pytest.raises(InvalidArgument, match="credit_returns_max"):
        await leases.RenewCreditLeases(pb.RenewCreditLeasesRequest(holder=holder, returns=many))

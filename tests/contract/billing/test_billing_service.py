"""BillingService as the gateway calls it: each method's answer, its typed errors, and the walls between tenants."""

from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis.bus import PUBLISHING_HEALTH, STREAMS_HEALTH
from chassis.bus.durables import ARCHIVE_HEALTH
from chassis.errors import AlreadyExists, DomainError, InvalidArgument, NotFound, PermissionDenied
from chassis.identity import Caller, acting_as
from finemesh.billing.v1 import billing_service_pb2 as pb
from finemesh.billing.v1 import invoice_service_pb2
from finemesh.billing.v1.invoice_service_pb2_grpc import InvoiceServiceStub
from tests.contract.billing.conftest import Customer, Mesh, job_price

USD = 10**9


async def test_health_knows_the_parts_that_a_restart_would_not_cure(mesh: Mesh) -> None:
    check = health_pb2_grpc.HealthStub(mesh.channels["gateway"]).Check
    for part in (STREAMS_HEALTH, PUBLISHING_HEALTH, ARCHIVE_HEALTH):
        answer = await check(health_pb2.HealthCheckRequest(service=part))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, part


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"base_model": ""}, "base_model"),
        ({"training_tokens": 0}, "training_tokens"),
        ({"training_tokens": -1}, "training_tokens"),
        ({"validation_tokens": -1}, "validation_tokens"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 100_000}, "epochs"),
        ({"evaluations": -1}, "evaluations"),
        ({"training_kind": 99}, "training_kind"),
        ({"training_tokens": 10**14, "epochs": 1000, "base_model": "meta-llama/Llama-3.1-8B"}, "training_tokens"),
    ],
)
async def test_estimates_name_the_field_that_is_wrong(
    customer: Customer, mesh: Mesh, changes: dict[str, Any], field: str
) -> None:
    with customer.calling(), pytest.raises(InvalidArgument) as refused:
        await mesh.billing.EstimatePrice(job_price(**changes))
    assert refused.value.reason == "INVALID_FIELD"
    assert [violation.field for violation in refused.value.violations] == [field]


@pytest.mark.parametrize("changes", [{"base_model": "nobody/nothing"}, {"price_book_version": "free"}])
async def test_what_has_no_price_is_said(customer: Customer, mesh: Mesh, changes: dict[str, Any]) -> None:
    with customer.calling(), pytest.raises(InvalidArgument) as refused:
        await mesh.billing.EstimatePrice(job_price(**changes))
    assert refused.value.reason == "PRICE_UNKNOWN"


async def test_top_up_and_balance(customer: Customer, stranger: Customer, mesh: Mesh) -> None:
    request = pb.TopUpRequest(amount_nanos_usd=7 * USD, request_id="first")
    with customer.calling("operator"):
        first = await mesh.billing.TopUp(request)
        again = await mesh.billing.TopUp(request)
        assert first == again
        assert first.balance.available_nanos_usd == 7 * USD
        with pytest.raises(AlreadyExists, match="REQUEST_ID_REUSED"):
            await mesh.billing.TopUp(pb.TopUpRequest(amount_nanos_usd=8 * USD, request_id="first"))
        # An operator pays in for others, by name.
        request.organization = f"organizations/{stranger.organization}"
        mesh.organizations.existing.add(request.organization)
        await mesh.billing.TopUp(request)
    with customer.calling():
        balance = (await mesh.billing.GetBalance(pb.GetBalanceRequest())).balance
        assert balance.organization == f"organizations/{customer.organization}"
        assert (balance.available.units, balance.held_nanos_usd, balance.owed_nanos_usd) == (7, 0, 0)
    with stranger.calling():
        assert (await mesh.billing.GetBalance(pb.GetBalanceRequest())).balance.available_nanos_usd == 7 * USD


async def test_nothing_is_booked_for_an_organization_that_does_not_exist(customer: Customer, mesh: Mesh) -> None:
    nobody = "organizations/org_typo"
    invoices = InvoiceServiceStub(mesh.channels["gateway"])
    note = invoice_service_pb2.CreateCreditNoteRequest(
        organization=nobody, amount_nanos_usd=1, reason="a gift", request_id="r"
    )
    month = invoice_service_pb2.CloseInvoiceRequest(name=f"{nobody}/invoices/2024-02")
    with customer.calling("operator"):
        for call in (
            mesh.billing.TopUp(pb.TopUpRequest(organization=nobody, amount_nanos_usd=7 * USD, request_id="typo")),
            invoices.CreateCreditNote(note),
            invoices.CloseInvoice(month),
        ):
            with pytest.raises(NotFound, match=nobody):
                await call
    rows = "SELECT count(*) FROM {} WHERE organization_id = 'org_typo'"
    for table in ("transactions", "accounts", "chains", "invoices", "credit_notes"):
        assert await mesh.pool.fetchval(rows.format(table)) == 0, table


async def test_top_up_needs_the_operator(customer: Customer, stranger: Customer, mesh: Mesh) -> None:
    for organization in ("", f"organizations/{stranger.organization}"):
        with customer.calling("admin", "member"), pytest.raises(PermissionDenied) as refused:
            await mesh.billing.TopUp(pb.TopUpRequest(organization=organization, amount_nanos_usd=1, request_id="r"))
        assert refused.value.reason == "ROLE_MISSING"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"amount_nanos_usd": 0}, "amount_nanos_usd"),
        ({"amount_nanos_usd": -1}, "amount_nanos_usd"),
        ({"amount_nanos_usd": 2 * 10**18}, "amount_nanos_usd"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 200}, "request_id"),
        ({"organization": "nonsense"}, "organization"),
    ],
)
async def test_top_up_names_the_field_that_is_wrong(
    customer: Customer, mesh: Mesh, changes: dict[str, Any], field: str
) -> None:
    request = pb.TopUpRequest(**{"amount_nanos_usd": 1, "request_id": "r", **changes})
    with customer.calling("operator"), pytest.raises(InvalidArgument) as refused:
        await mesh.billing.TopUp(request)
    assert [violation.field for violation in refused.value.violations] == [field]


async def test_a_balance_has_an_upper_limit(customer: Customer, mesh: Mesh) -> None:
    with customer.calling("operator"):
        await mesh.billing.TopUp(pb.TopUpRequest(amount_nanos_usd=10**18, request_id="all"))
        with pytest.raises(DomainError, match="add less"):
            await mesh.billing.TopUp(pb.TopUpRequest(amount_nanos_usd=1, request_id="more"))


async def test_calls_without_an_organization_are_refused(mesh: Mesh) -> None:
    with acting_as(Caller(service="gateway")):
        for call in (
            mesh.billing.GetBalance(pb.GetBalanceRequest()),
            mesh.billing.GetInvoice(pb.GetInvoiceRequest()),
        ):
            with pytest.raises(PermissionDenied) as refused:
                await call
            assert refused.value.reason == "CALLER_NOT_ALLOWED"


async def test_an_invoice_of_a_month_without_use_is_empty(customer: Customer, mesh: Mesh) -> None:
    with customer.calling("admin"):
        running = (await mesh.billing.GetInvoice(pb.GetInvoiceRequest())).invoice
        assert running.open
        assert (len(running.lines), running.total_nanos_usd) == (0, 0)
        named = (await mesh.billing.GetInvoice(pb.GetInvoiceRequest(name=running.name))).invoice
        assert named == running
        past = pb.GetInvoiceRequest(name=f"organizations/{customer.organization}/invoices/2024-02")
        # Nothing is closed where nothing was charged: a late record would still be on this invoice.
        assert (await mesh.billing.GetInvoice(past)).invoice.open


async def test_invoices_of_others_and_of_the_future_do_not_exist(
    customer: Customer, stranger: Customer, mesh: Mesh
) -> None:
    with customer.calling("admin"):
        for name in (
            f"organizations/{stranger.organization}/invoices/2024-02",
            f"organizations/{customer.organization}/invoices/2099-01",
        ):
            with pytest.raises(NotFound):
                await mesh.billing.GetInvoice(pb.GetInvoiceRequest(name=name))
        for name in ("nonsense", f"organizations/{customer.organization}/invoices/2024-13"):
            with pytest.raises(InvalidArgument):
                await mesh.billing.GetInvoice(pb.GetInvoiceRequest(name=name))


async def test_other_tenants_jobs_and_projects_do_not_exist(customer: Customer, stranger: Customer, mesh: Mesh) -> None:
    await customer.pay_in(5 * USD)
    await customer.hold()
    with stranger.calling():
        with pytest.raises(NotFound):
            await mesh.billing.GetJobCharge(pb.GetJobChargeRequest(tuning_job=customer.job()))
        with pytest.raises(NotFound):
            await mesh.billing.ListUsageRecords(pb.ListUsageRecordsRequest(parent=f"projects/{customer.project}"))
    with customer.calling():
        with pytest.raises(NotFound):
            await mesh.billing.GetJobCharge(pb.GetJobChargeRequest(tuning_job=customer.job(99)))
        with pytest.raises(InvalidArgument):
            await mesh.billing.GetJobCharge(pb.GetJobChargeRequest(tuning_job="nonsense"))


@pytest.mark.parametrize("field", ["resource", "model", "api_key_id"])
@pytest.mark.parametrize("text", ["\0", "a\nb", 513 * "a"])
async def test_a_list_of_usage_names_the_field_that_is_wrong(
    customer: Customer, mesh: Mesh, field: str, text: str
) -> None:
    request = pb.ListUsageRecordsRequest(**{field: text})  # type: ignore[arg-type]
    with customer.calling(), pytest.raises(InvalidArgument) as refused:
        await mesh.billing.ListUsageRecords(request)
    assert [violation.field for violation in refused.value.violations] == [field]


async def test_usage_pages_refuse_what_is_not_theirs(customer: Customer, mesh: Mesh) -> None:
    with customer.calling():
        assert not (await mesh.billing.ListUsageRecords(pb.ListUsageRecordsRequest())).usage_records
        for changes in ({"page_size": -1}, {"page_token": "forged"}):
            with pytest.raises(InvalidArgument):
                await mesh.billing.ListUsageRecords(pb.ListUsageRecordsRequest(**changes))

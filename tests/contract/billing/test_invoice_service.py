"""InvoiceService as the gateway calls it: documents, corrections and reports, roles, and the walls between tenants."""

import csv
import hashlib
import io
import json
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from google.protobuf.json_format import Parse
from google.protobuf.timestamp_pb2 import Timestamp
from pypdf import PdfReader

from chassis.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
)
from chassis.identity import Caller, acting_as
from finemesh.billing.v1 import billing_service_pb2, invoice_pb2, usage_record_pb2
from finemesh.billing.v1 import invoice_service_pb2 as pb
from finemesh.billing.v1.invoice_service_pb2_grpc import InvoiceServiceStub
from finemesh.events.v1 import usage_events_pb2
from services.billing.api import requests
from services.billing.config import BillingSettings
from tests.contract.billing.conftest import Customer, Mesh

if TYPE_CHECKING:
    from finemesh.billing.v1.invoice_service_pb2_grpc import InvoiceServiceAsyncStub

USD = 10**9
MONTH, DAY = "2024-02", datetime(2024, 2, 10, tzinfo=UTC)
# A device minute of an H100, and five of them a month in the past.
MINUTE, MINUTES = 56_000_000, 5


@pytest.fixture
def invoices(mesh: Mesh) -> "InvoiceServiceAsyncStub":
    return InvoiceServiceStub(mesh.channels["gateway"])


@pytest_asyncio.fixture(loop_scope="session")
async def used(customer: Customer, mesh: Mesh) -> AsyncIterator[Customer]:
    """A customer who ran an endpoint for five minutes in a month long past, and served a call of an adapter."""
    for number in range(MINUTES):
        await mesh.publish(
            usage_events_pb2.EndpointMinuteRecorded(
                work_key=f"ep_1:7:{number}",
                endpoint=f"projects/{customer.project}/endpoints/ep_1",
                project_id=customer.project,
                organization_id=customer.organization,
                hardware_type="nvidia-h100-80gb",
                device_count=1,
                minute=number,
                usage_time=stamp(DAY + timedelta(minutes=number)),
            )
        )
    await mesh.publish(
        usage_events_pb2.InferenceUsageRecorded(
            records=[
                usage_events_pb2.InferenceUsage(
                    work_key=f"{customer.organization}-gen",
                    project_id=customer.project,
                    organization_id=customer.organization,
                    model_id="acme/bot",
                    base_model="finemesh/demo-llama",
                    input_tokens=10**6,
                    output_tokens=10**6,
                    usage_time=stamp(DAY + timedelta(days=1)),
                    api_key_id="key_7",
                )
            ]
        )
    )
    count = "SELECT count(*) FROM usage_records WHERE organization_id = $1"
    await mesh.until(count, MINUTES + 2, customer.organization)
    yield customer


USED = MINUTES * MINUTE + 150_000_000


def stamp(moment: datetime) -> Timestamp:
    value = Timestamp()
    value.FromDatetime(moment)
    return value


def invoice_name(customer: Customer, month: str = MONTH) -> str:
    return f"organizations/{customer.organization}/invoices/{month}"


async def close(customer: Customer, invoices: "InvoiceServiceAsyncStub") -> invoice_pb2.Invoice:
    with customer.calling("operator"):
        return (await invoices.CloseInvoice(pb.CloseInvoiceRequest(name=invoice_name(customer)))).invoice


async def test_a_closed_invoice_is_the_same_everywhere_and_for_good(
    used: Customer, mesh: Mesh, invoices: "InvoiceServiceAsyncStub"
) -> None:
    get = billing_service_pb2.GetInvoiceRequest(name=invoice_name(used))
    with used.calling("admin"):
        before = (await mesh.billing.GetInvoice(get)).invoice
    assert before.open
    assert [line.amount_nanos_usd for line in before.lines] == [280_000_000, 50_000_000, 100_000_000]
    closed = await close(used, invoices)
    assert await close(used, invoices) == closed
    assert closed.number.startswith("FM-")
    with used.calling("admin"):
        assert (await mesh.billing.GetInvoice(get)).invoice == closed
    assert closed.lines == before.lines
    assert closed.total_nanos_usd == before.total_nanos_usd == 430_000_000
    # Anyone can check the digest: it is of the message without itself.
    plain = invoice_pb2.Invoice.FromString(closed.SerializeToString())
    plain.ClearField("sha256")
    assert hashlib.sha256(plain.SerializeToString(deterministic=True)).hexdigest() == closed.sha256
    await mesh.until(
        "SELECT count(*) FROM outbox WHERE subject LIKE '%invoice.closed' AND headers ->> 'ce-subject' = $1",
        1,
        invoice_name(used),
    )


@pytest.mark.parametrize("closed", [False, True])
async def test_an_invoice_as_documents(used: Customer, invoices: "InvoiceServiceAsyncStub", closed: bool) -> None:
    number = (await close(used, invoices)).number if closed else f"invoice-{MONTH}-open"

    async def render(format_: str) -> pb.RenderInvoiceResponse:
        request = pb.RenderInvoiceRequest(name=invoice_name(used), format=f"INVOICE_FORMAT_{format_}")  # type: ignore[arg-type]
        first = await invoices.RenderInvoice(request)
        assert await invoices.RenderInvoice(request) == first
        assert first.filename.startswith(number)
        return first

    with used.calling("admin"):
        page = await render("HTML")
        assert page.content_type.startswith("text/html")
        assert "0.43" in page.content.decode()
        assert (await render("UNSPECIFIED")).content == page.content
        pdf = await render("PDF")
        assert (pdf.content_type, pdf.filename) == ("application/pdf", f"{number}.pdf")
        assert "Page 1 of 1" in PdfReader(io.BytesIO(pdf.content)).pages[0].extract_text()
        rows = list(csv.DictReader(io.StringIO((await render("CSV")).content.decode(), newline="")))
        assert [row["amount"] for row in rows] == ["0.28", "0.05", "0.10", "0.43"]
        text = (await render("JSON")).content.decode()
        assert json.loads(text)["total_nanos_usd"] == "430000000"
        assert Parse(text, invoice_pb2.Invoice()).open is not closed


async def test_the_list_has_closed_invoices_and_open_ones(used: Customer, invoices: "InvoiceServiceAsyncStub") -> None:
    closed = await close(used, invoices)
    running = f"{datetime.now(UTC):%Y-%m}"
    with used.calling("admin"):
        everything = (await invoices.ListInvoices(pb.ListInvoicesRequest())).invoices
        assert [invoice.name.rpartition("/")[2] for invoice in everything] == [running, MONTH]
        assert [invoice.open for invoice in everything] == [True, False]
        assert everything[1].number == closed.number
        assert everything[1].total == closed.total
        assert not any(invoice.lines for invoice in everything)
        first = await invoices.ListInvoices(pb.ListInvoicesRequest(page_size=1))
        assert list(first.invoices) == [everything[0]]
        rest = await invoices.ListInvoices(pb.ListInvoicesRequest(page_size=1, page_token=first.next_page_token))
        assert (list(rest.invoices), rest.next_page_token) == ([everything[1]], "")
        with pytest.raises(InvalidArgument):
            await invoices.ListInvoices(pb.ListInvoicesRequest(page_token="forged"))


async def test_a_month_that_runs_or_is_empty_is_not_closed(
    customer: Customer, invoices: "InvoiceServiceAsyncStub"
) -> None:
    with customer.calling("operator"):
        for month, problem in ((f"{datetime.now(UTC):%Y-%m}", "is not over"), (MONTH, "nothing to close")):
            with pytest.raises(FailedPrecondition, match=problem) as refused:
                await invoices.CloseInvoice(pb.CloseInvoiceRequest(name=invoice_name(customer, month)))
            assert refused.value.reason == "STATE_CONFLICT"
        with pytest.raises(InvalidArgument):
            await invoices.CloseInvoice(pb.CloseInvoiceRequest(name=invoice_name(customer, "2024-13")))


async def test_an_operator_acts_for_any_organization(
    used: Customer, stranger: Customer, mesh: Mesh, invoices: "InvoiceServiceAsyncStub"
) -> None:
    mesh.organizations.existing.add(f"organizations/{used.organization}")
    with stranger.calling("operator", "admin"):
        invoice = (await invoices.CloseInvoice(pb.CloseInvoiceRequest(name=invoice_name(used)))).invoice
        request = pb.CreateCreditNoteRequest(
            organization=f"organizations/{used.organization}",
            amount_nanos_usd=10**8,
            reason="we were slow",
            invoice=invoice.name,
            request_id="r",
        )
        note = (await invoices.CreateCreditNote(request)).credit_note
        assert (await invoices.CreateCreditNote(request)).credit_note == note
        assert note.number.startswith("CN-")
        assert (note.invoice, note.billing_month) == (invoice.name, f"{datetime.now(UTC):%Y-%m}")
        with pytest.raises(AlreadyExists, match="REQUEST_ID_REUSED"):
            await invoices.CreateCreditNote(pb.CreateCreditNoteRequest(**{**_fields(request), "reason": "other"}))
        for invoice_named, told in ((invoice.name, "given_back_nanos_usd"), ("", "earned_nanos_usd")):
            too_much = {"amount_nanos_usd": USED, "request_id": "s", "invoice": invoice_named}
            with pytest.raises(OutOfRange) as refused:
                await invoices.CreateCreditNote(pb.CreateCreditNoteRequest(**{**_fields(request), **too_much}))
            expected = {"given_back_nanos_usd": 10**8, "earned_nanos_usd": USED - 10**8}
            assert refused.value.metadata[told] == str(expected[told])
        # It is the other organization's note.
        assert not (await invoices.ListCreditNotes(pb.ListCreditNotesRequest())).credit_notes
    with used.calling("admin"):
        assert list((await invoices.ListCreditNotes(pb.ListCreditNotesRequest())).credit_notes) == [note]


def _fields(request: pb.CreateCreditNoteRequest) -> dict[str, Any]:
    return {field.name: value for field, value in request.ListFields()}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"organization": "nonsense"}, "organization"),
        ({"amount_nanos_usd": 0}, "amount_nanos_usd"),
        ({"amount_nanos_usd": -5}, "amount_nanos_usd"),
        ({"reason": ""}, "reason"),
        ({"reason": "   "}, "reason"),
        ({"reason": "x" * 501}, "reason"),
        ({"reason": "a\nb"}, "reason"),
        ({"request_id": ""}, "request_id"),
        ({"resource": "x" * 600}, "resource"),
        ({"invoice": "organizations/other/invoices/2024-02"}, "invoice"),
        ({"invoice": "nonsense"}, "invoice"),
    ],
)
async def test_a_credit_note_names_the_field_that_is_wrong(
    customer: Customer, invoices: "InvoiceServiceAsyncStub", changes: dict[str, Any], field: str
) -> None:
    fields: dict[str, Any] = {
        "organization": f"organizations/{customer.organization}",
        "amount_nanos_usd": 1,
        "reason": "because",
        "request_id": "r",
        **changes,
    }
    with customer.calling("operator"), pytest.raises(InvalidArgument) as refused:
        await invoices.CreateCreditNote(pb.CreateCreditNoteRequest(**fields))
    assert [violation.field for violation in refused.value.violations] == [field]


async def test_roles(customer: Customer, invoices: "InvoiceServiceAsyncStub") -> None:
    credit = pb.CreateCreditNoteRequest(
        organization=f"organizations/{customer.organization}", amount_nanos_usd=1, reason="x", request_id="r"
    )
    with customer.calling("member", "admin"):
        for call in (
            invoices.CloseInvoice(pb.CloseInvoiceRequest(name=invoice_name(customer))),
            invoices.CreateCreditNote(credit),
        ):
            with pytest.raises(PermissionDenied) as refused:
                await call
            assert refused.value.reason == "ROLE_MISSING"
    profile = pb.UpdateBillingProfileRequest(profile=invoice_pb2.BillingParty(legal_name="Acme"))
    with customer.calling("member"), pytest.raises(PermissionDenied) as refused:
        await invoices.UpdateBillingProfile(profile)
    assert refused.value.metadata["role"] == "admin"


async def test_the_profile_stands_on_open_invoices(
    used: Customer, stranger: Customer, mesh: Mesh, invoices: "InvoiceServiceAsyncStub"
) -> None:
    party = invoice_pb2.BillingParty(
        legal_name="Zażółć Gęślą Jaźń", address_lines=["ul. Długa 1", "Łódź"], tax_id="PL1", email="a@example.com"
    )
    with used.calling("admin"):
        stored = (await invoices.UpdateBillingProfile(pb.UpdateBillingProfileRequest(profile=party))).profile
        assert stored == party
        assert (await invoices.GetBillingProfile(pb.GetBillingProfileRequest())).profile == party
        get = billing_service_pb2.GetInvoiceRequest(name=invoice_name(used))
        assert (await mesh.billing.GetInvoice(get)).invoice.customer == party
    with stranger.calling("admin"):
        assert not (await invoices.GetBillingProfile(pb.GetBillingProfileRequest())).profile.legal_name


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"legal_name": ""}, "profile.legal_name"),
        ({"legal_name": "x" * 201}, "profile.legal_name"),
        ({"legal_name": "a\x00"}, "profile.legal_name"),
        ({"address_lines": ["a"] * 11}, "profile.address_lines"),
        ({"address_lines": ["a", ""]}, "profile.address_lines[1]"),
        ({"tax_id": "a\tb"}, "profile.tax_id"),
        ({"email": "x" * 201}, "profile.email"),
    ],
)
async def test_a_profile_names_the_field_that_is_wrong(
    customer: Customer, invoices: "InvoiceServiceAsyncStub", changes: dict[str, Any], field: str
) -> None:
    party = invoice_pb2.BillingParty(**{"legal_name": "Acme", **changes})
    with customer.calling("admin"), pytest.raises(InvalidArgument) as refused:
        await invoices.UpdateBillingProfile(pb.UpdateBillingProfileRequest(profile=party))
    assert [violation.field for violation in refused.value.violations] == [field]


async def test_costs(used: Customer, stranger: Customer, invoices: "InvoiceServiceAsyncStub") -> None:
    request = pb.QueryCostsRequest(
        start_day="2024-02-01", end_day="2024-02-29", group_by=[pb.COST_DIMENSION_DAY, pb.COST_DIMENSION_KIND]
    )
    with used.calling():
        answer = await invoices.QueryCosts(request)
        assert [(list(row.keys), row.quantity, row.amount_nanos_usd) for row in answer.rows] == [
            (["2024-02-10", "endpoint_minutes"], MINUTES, MINUTES * MINUTE),
            (["2024-02-11", "input_tokens"], 10**6, 50_000_000),
            (["2024-02-11", "output_tokens"], 10**6, 100_000_000),
        ]
        assert answer.total_nanos_usd == USED
        by_key = pb.QueryCostsRequest(
            start_day="2024-02-01", end_day="2024-02-29", group_by=[pb.COST_DIMENSION_API_KEY]
        )
        assert [list(row.keys) for row in (await invoices.QueryCosts(by_key)).rows] == [[""], ["key_7"]]
        assert not (await invoices.QueryCosts(pb.QueryCostsRequest())).rows
    with stranger.calling("admin"):
        assert not (await invoices.QueryCosts(request)).rows
        # Naming somebody else's project does not help.
        request.project_id = used.project
        assert not (await invoices.QueryCosts(request)).rows


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"start_day": "yesterday"}, "start_day"),
        ({"start_day": "20240201"}, "start_day"),
        ({"end_day": "2024-02-30"}, "end_day"),
        ({"start_day": "2024-02-02", "end_day": "2024-02-01"}, "end_day"),
        ({"start_day": "2024-01-01", "end_day": "2025-02-05"}, "end_day"),
        ({"group_by": [99]}, "group_by[0]"),
        ({"group_by": [1, 2, 1]}, "group_by[2]"),
        ({"group_by": [0]}, "group_by[0]"),
        ({"project_id": "\0"}, "project_id"),
    ],
)
async def test_a_report_names_the_field_that_is_wrong(
    customer: Customer, invoices: "InvoiceServiceAsyncStub", changes: dict[str, Any], field: str
) -> None:
    with customer.calling(), pytest.raises(InvalidArgument) as refused:
        await invoices.QueryCosts(pb.QueryCostsRequest(**changes))
    assert [violation.field for violation in refused.value.violations] == [field]


async def test_usage_is_exported_oldest_first(used: Customer, invoices: "InvoiceServiceAsyncStub") -> None:
    request = pb.ExportUsageRequest(start_time=stamp(DAY), end_time=stamp(DAY + timedelta(days=3)))
    with used.calling():
        records = [record async for answer in invoices.ExportUsage(request) for record in answer.usage_records]
        assert len(records) == MINUTES + 2
        assert [record.usage_time.seconds for record in records] == sorted(
            record.usage_time.seconds for record in records
        )
        assert {record.billing_month for record in records} == {MONTH}
        month = pb.ExportUsageRequest(billing_month=MONTH)
        assert [record async for answer in invoices.ExportUsage(month) for record in answer.usage_records] == records
        month.billing_month = "2024-03"
        assert [answer async for answer in invoices.ExportUsage(month)] == []
        request.kinds.append(usage_record_pb2.USAGE_KIND_OUTPUT_TOKENS)
        (found,) = [record async for answer in invoices.ExportUsage(request) for record in answer.usage_records]
        assert (found.api_key_id, found.unit_price_nanos_usd) == ("key_7", 100_000_000)
        request.resource = "other"
        assert [answer async for answer in invoices.ExportUsage(request)] == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"start_time": None}, "start_time"),
        ({"end_time": None}, "end_time"),
        ({"end_time": stamp(DAY - timedelta(days=1))}, "end_time"),
        ({"end_time": Timestamp(seconds=10**15)}, "end_time"),
        ({"kinds": [99]}, "kinds[0]"),
        ({"billing_month": "2024-13"}, "billing_month"),
        ({"resource": "\0"}, "resource"),
    ],
)
async def test_an_export_names_the_field_that_is_wrong(
    customer: Customer, invoices: "InvoiceServiceAsyncStub", changes: dict[str, Any], field: str
) -> None:
    fields = {"start_time": stamp(DAY), "end_time": stamp(DAY), **changes}
    with customer.calling(), pytest.raises(InvalidArgument) as refused:
        [answer async for answer in invoices.ExportUsage(pb.ExportUsageRequest(**fields))]
    assert [violation.field for violation in refused.value.violations] == [field]


async def test_usage_is_listed_with_filters(used: Customer, mesh: Mesh) -> None:
    async def found(**filters: Any) -> list[str]:
        request = billing_service_pb2.ListUsageRecordsRequest(page_size=2, **filters)
        keys: list[str] = []
        while True:
            answer = await mesh.billing.ListUsageRecords(request)
            keys += [record.work_key for record in answer.usage_records]
            request.page_token = answer.next_page_token
            if not request.page_token:
                return keys

    served = [f"{used.organization}-gen:output", f"{used.organization}-gen:input"]
    minutes = [f"ep_1:7:{number}" for number in reversed(range(MINUTES))]
    with used.calling():
        assert await found() == served + minutes
        assert await found(api_key_id="key_7") == served
        assert await found(model="nvidia-h100-80gb") == minutes
        assert await found(kinds=["USAGE_KIND_INPUT_TOKENS", "USAGE_KIND_ENDPOINT_MINUTES"]) == served[1:] + minutes
        assert (
            await found(start_time=stamp(DAY + timedelta(minutes=2)), end_time=stamp(DAY + timedelta(hours=1)))
            == (minutes[:3])
        )
        # A token belongs to its filters.
        first = await mesh.billing.ListUsageRecords(billing_service_pb2.ListUsageRecordsRequest(page_size=1))
        with pytest.raises(InvalidArgument):
            await found(page_token=first.next_page_token, model="other")
        for wrong in ({"kinds": [99]}, {"start_time": stamp(DAY), "end_time": stamp(DAY - timedelta(days=1))}):
            with pytest.raises(InvalidArgument):
                await found(**wrong)


async def test_tenants_are_walls(
    used: Customer, stranger: Customer, mesh: Mesh, invoices: "InvoiceServiceAsyncStub"
) -> None:
    await close(used, invoices)
    span: dict[str, Any] = {"start_time": stamp(DAY), "end_time": stamp(DAY + timedelta(days=3))}
    with stranger.calling("admin"):
        of_another: tuple[Awaitable[object], ...] = (
            invoices.RenderInvoice(pb.RenderInvoiceRequest(name=invoice_name(used))),
            mesh.billing.GetInvoice(billing_service_pb2.GetInvoiceRequest(name=invoice_name(used))),
        )
        for call in of_another:
            with pytest.raises(NotFound):
                await call
        with pytest.raises(NotFound):
            theirs = pb.ExportUsageRequest(parent=f"projects/{used.project}", **span)
            [answer async for answer in invoices.ExportUsage(theirs)]
        assert [answer async for answer in invoices.ExportUsage(pb.ExportUsageRequest(**span))] == []
        assert len((await invoices.ListInvoices(pb.ListInvoicesRequest())).invoices) == 1
    with acting_as(Caller(service="gateway")):
        of_nobody: tuple[Awaitable[object], ...] = (
            invoices.ListInvoices(pb.ListInvoicesRequest()),
            invoices.ListCreditNotes(pb.ListCreditNotesRequest()),
            invoices.GetBillingProfile(pb.GetBillingProfileRequest()),
            invoices.QueryCosts(pb.QueryCostsRequest()),
            invoices.RenderInvoice(pb.RenderInvoiceRequest()),
        )
        for call in of_nobody:
            with pytest.raises(PermissionDenied):
                await call


async def test_only_the_gateway_speaks_for_users(customer: Customer, mesh: Mesh) -> None:
    with customer.calling("operator"), pytest.raises(PermissionDenied) as refused:
        await InvoiceServiceStub(mesh.channels["scheduler"]).ListInvoices(pb.ListInvoicesRequest())
    assert refused.value.reason == "CALLER_NOT_ALLOWED"


def test_what_does_not_fit_into_a_message_is_a_size_limit() -> None:
    settings = BillingSettings(message_size_bytes_max=4096)
    requests.check_size(3000, settings)
    with pytest.raises(ResourceExhausted) as refused:
        requests.check_size(4096, settings)
    assert refused.value.reason == "SIZE_LIMIT"
    assert refused.value.metadata["limit"] == "message_size_bytes_max"

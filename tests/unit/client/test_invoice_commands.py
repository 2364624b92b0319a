"""`finemesh billing invoice` and its neighbours against a server that answers from memory: files, names,
JSON, retries."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from typer.testing import CliRunner, Result

from finemesh.billing.v1 import (
    balance_pb2,
    billing_service_pb2,
    billing_service_pb2_grpc,
    credit_note_pb2,
    invoice_pb2,
    invoice_service_pb2_grpc,
    usage_record_pb2,
)
from finemesh.billing.v1 import invoice_service_pb2 as pb
from finemesh_client.cli.billing.cost_commands import COLUMNS, row_of
from finemesh_client.cli.main import app
from tests.unit.client.conftest import Serve

NOVEMBER = "organizations/acme/invoices/2026-11"


@dataclass
class Mesh(invoice_service_pb2_grpc.InvoiceServiceServicer, billing_service_pb2_grpc.BillingServiceServicer):
    """Remembers what it was asked; `breaks` is how many records an export sends before the connection breaks."""

    asked: list[Message] = field(default_factory=list)
    document: bytes = b"%PDF-1.4"
    breaks: list[int] = field(default_factory=list)

    def GetBalance(self, request: Message, context: object) -> billing_service_pb2.GetBalanceResponse:
        return billing_service_pb2.GetBalanceResponse(balance=balance_pb2.Balance(organization="organizations/acme"))

    def GetInvoice(self, request: Message, context: object) -> billing_service_pb2.GetInvoiceResponse:
        self.asked.append(request)
        return billing_service_pb2.GetInvoiceResponse(invoice=_invoice())

    def RenderInvoice(self, request: Message, context: object) -> pb.RenderInvoiceResponse:
        self.asked.append(request)
        return pb.RenderInvoiceResponse(content=self.document, content_type="application/pdf", filename="FM-000042.pdf")

    def ListInvoices(self, request: Message, context: object) -> pb.ListInvoicesResponse:
        return pb.ListInvoicesResponse(invoices=[_invoice()])

    def CloseInvoice(self, request: Message, context: object) -> pb.CloseInvoiceResponse:
        self.asked.append(request)
        return pb.CloseInvoiceResponse(invoice=_invoice())

    def CreateCreditNote(self, request: Message, context: object) -> pb.CreateCreditNoteResponse:
        self.asked.append(request)
        note = credit_note_pb2.CreditNote(number="CN-000007", amount_nanos_usd=5 * 10**9, reason="[red]slow[/red]")
        return pb.CreateCreditNoteResponse(credit_note=note)

    def GetBillingProfile(self, request: Message, context: object) -> pb.GetBillingProfileResponse:
        return pb.GetBillingProfileResponse(
            profile=invoice_pb2.BillingParty(legal_name="Acme", address_lines=["Weg 1"])
        )

    def UpdateBillingProfile(
        self, request: pb.UpdateBillingProfileRequest, context: object
    ) -> pb.UpdateBillingProfileResponse:
        self.asked.append(request)
        return pb.UpdateBillingProfileResponse(profile=request.profile)

    def QueryCosts(self, request: Message, context: object) -> pb.QueryCostsResponse:
        self.asked.append(request)
        row = pb.CostRow(keys=["2026-11-01", "p"], quantity=7, amount_nanos_usd=10**9)
        return pb.QueryCostsResponse(rows=[row], total_nanos_usd=10**9)

    def ExportUsage(
        self, request: pb.ExportUsageRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ExportUsageResponse]:
        self.asked.append(pb.ExportUsageRequest.FromString(request.SerializeToString()))
        left = [record for record in RECORDS if record.usage_time.seconds >= request.start_time.seconds]
        limit = self.breaks.pop(0) if self.breaks else None
        yield pb.ExportUsageResponse(usage_records=left[:limit])
        if limit is not None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


# Two share each moment, so that a break can fall between them.
RECORDS = [
    usage_record_pb2.UsageRecord(
        name=f"projects/p/usageRecords/{number}",
        work_key=f"{'=' if number == 3 else ''}gen-{number}:input",
        kind=usage_record_pb2.USAGE_KIND_INPUT_TOKENS,
        quantity=number,
        usage_time=Timestamp(seconds=1000 + number // 2),
        billing_month="2026-11",
    )
    for number in range(1, 8)
]


def _invoice() -> invoice_pb2.Invoice:
    line = invoice_pb2.InvoiceLine(
        description="Tuning, job ft-1", quantity=5, unit="tokens", amount_nanos_usd=5 * 10**9
    )
    return invoice_pb2.Invoice(name=NOVEMBER, number="FM-000042", lines=[line], total_nanos_usd=5 * 10**9, sha256="ab")


@pytest.fixture
def mesh(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mesh:
    mesh = Mesh()
    serve(
        mesh,
        invoice_service_pb2_grpc.add_InvoiceServiceServicer_to_server,
        billing_service_pb2_grpc.add_BillingServiceServicer_to_server,
    )
    monkeypatch.chdir(tmp_path)
    return mesh


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["billing", *arguments], env={"COLUMNS": "200"})


def test_a_month_is_enough_to_name_an_invoice(mesh: Mesh) -> None:
    shown = run("invoice", "2026-11")
    assert "FM-000042" in shown.stdout
    assert "$5.00" in shown.stdout
    assert json.loads(run("invoice", "--json").stdout)["number"] == "FM-000042"
    run("invoice", NOVEMBER)
    assert [request.name for request in mesh.asked] == [NOVEMBER, "", NOVEMBER]  # type: ignore[attr-defined]
    refused = run("invoice", "November")
    assert refused.exit_code == 2
    assert "is no month" in refused.output


def test_a_document_is_written_under_its_own_name_or_the_one_given(mesh: Mesh) -> None:
    assert "FM-000042.pdf" in run("invoice", "2026-11", "--format", "pdf").stdout
    assert Path("FM-000042.pdf").read_bytes() == mesh.document
    # The same again is fine; something else does not replace it.
    assert run("invoice", "2026-11", "--format", "pdf").exit_code == 0
    mesh.document = b"other"
    refused = run("invoice", "2026-11", "--format", "pdf")
    assert (refused.exit_code, Path("FM-000042.pdf").read_bytes()) == (2, b"%PDF-1.4")
    described = json.loads(run("invoice", "2026-11", "-o", "mine.pdf", "--json").stdout)
    assert described == {"file": "mine.pdf", "content_type": "application/pdf", "size_bytes": 5}
    assert run("invoice", "--format", "csv", "-o", "-").stdout_bytes == b"other"
    assert sorted(path.name for path in Path().iterdir()) == ["FM-000042.pdf", "mine.pdf"]
    formats = [request.format for request in mesh.asked]  # type: ignore[attr-defined]
    assert formats == [pb.INVOICE_FORMAT_PDF] * 4 + [pb.INVOICE_FORMAT_CSV]
    assert "say what to write" in run("invoice", "-o", "invoice.txt").output


def test_operators_close_and_give_back(mesh: Mesh) -> None:
    assert "FM-000042" in run("close-invoice", "2026-11", "--organization", "organizations/other").stdout
    arguments = ("organizations/other", "5", "--reason", "slow", "--invoice", "2026-10", "--request-id", "r")
    shown = run("credit-note", *arguments)
    # A text of ours is never taken for markup.
    assert "[red]slow[/red]" in shown.stdout
    closed, note = mesh.asked
    assert closed == pb.CloseInvoiceRequest(name="organizations/other/invoices/2026-11")
    assert note == pb.CreateCreditNoteRequest(
        organization="organizations/other",
        amount_nanos_usd=5 * 10**9,
        reason="slow",
        invoice="organizations/other/invoices/2026-10",
        request_id="r",
    )
    assert run("credit-note", "organizations/other", "-5", "--reason", "x").exit_code == 2


def test_a_profile_is_changed_field_by_field(mesh: Mesh) -> None:
    assert "Weg 1" in run("profile").stdout
    assert not mesh.asked
    run("profile", "--tax-id", "DE1")
    run("profile", "--address", "a", "--address", "b", "--email", "a@b.example")
    assert [request.profile for request in mesh.asked] == [  # type: ignore[attr-defined]
        invoice_pb2.BillingParty(legal_name="Acme", address_lines=["Weg 1"], tax_id="DE1"),
        invoice_pb2.BillingParty(legal_name="Acme", address_lines=["a", "b"], email="a@b.example"),
    ]


def test_costs_are_summed_by_what_is_asked_for(mesh: Mesh) -> None:
    shown = run("costs", "--by", "day", "--by", "project", "--from", "2026-11-01", "--project", "projects/p")
    assert "$1.00" in shown.stdout
    assert run("costs", "--json").exit_code == 0
    assert mesh.asked == [
        pb.QueryCostsRequest(
            start_day="2026-11-01",
            group_by=[pb.COST_DIMENSION_DAY, pb.COST_DIMENSION_PROJECT],
            project_id="p",
        ),
        pb.QueryCostsRequest(group_by=[pb.COST_DIMENSION_MODEL]),
    ]


@pytest.mark.parametrize("breaks", [[], [1], [3, 2], [4, 0, 1]])
def test_an_export_has_every_record_once_whatever_breaks(mesh: Mesh, breaks: list[int]) -> None:
    mesh.breaks = list(breaks)
    assert "7 usage records" in run("export-usage", "--month", "2026-11", "-o", "usage.csv").stdout
    with Path("usage.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["quantity"]) for row in rows] == list(range(1, 8))
    # A key that a spreadsheet would run is a text.
    assert rows[2]["work_key"] == "'=gen-3:input"
    assert rows[0]["kind"] == "input_tokens"
    assert {request.billing_month for request in mesh.asked} == {"2026-11"}  # type: ignore[attr-defined]
    assert not Path("usage.csv.part").exists()


@pytest.mark.parametrize("start", ["=", " =", "\t \u00a0@", "\ufeff+", "\u3000－", "\r", "\n-"])
def test_no_text_of_an_export_is_a_formula(start: str) -> None:
    evil = f"{start}cmd|' /C calc'!A0"
    row = dict(
        zip(COLUMNS, row_of(usage_record_pb2.UsageRecord(resource=evil, model="plain", quantity=5)), strict=True)
    )
    assert (row["resource"], row["model"], row["quantity"]) == (f"'{evil}", "plain", 5)


def test_an_export_of_days_in_json_lines(mesh: Mesh) -> None:
    arguments = ("--from", "2026-11-01", "--to", "2026-11-02", "--kind", "input_tokens", "--format", "jsonl", "-o", "-")
    run("export-usage", *arguments)
    (request,) = mesh.asked
    assert isinstance(request, pb.ExportUsageRequest)
    assert request.start_time.ToJsonString() == "2026-11-01T00:00:00Z"
    assert request.end_time.ToJsonString() == "2026-11-03T00:00:00Z"
    assert list(request.kinds) == [usage_record_pb2.USAGE_KIND_INPUT_TOKENS]
    assert "give --month" in run("export-usage", "-o", "-").output

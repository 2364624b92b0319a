"""Who sees what of an organization's money: a test for each cell of the table in docs/ledger.md."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.timestamp_pb2 import Timestamp

from chassis.errors import DomainError
from finemesh.billing.v1 import billing_service_pb2, budget_service_pb2, ledger_service_pb2
from finemesh.billing.v1 import invoice_service_pb2 as pb
from finemesh.billing.v1.budget_service_pb2_grpc import BudgetServiceStub
from finemesh.billing.v1.invoice_service_pb2_grpc import InvoiceServiceStub
from finemesh.billing.v1.ledger_service_pb2_grpc import LedgerServiceStub
from finemesh.events.v1 import usage_events_pb2
from tests.contract.billing.conftest import Customer, Mesh

# The minutes that each project used, of one device.
MINUTES = {"mine": 1, "sibling": 2, "foreign": 4}
MINUTE_NANOS_USD = 56_000_000
MONTH, DAY = "2024-02", datetime(2024, 2, 10, tzinfo=UTC)
DAYS = {"start_day": "2024-02-01", "end_day": "2024-02-29"}
SHOWN, ROLE_MISSING, NOT_FOUND = "shown", "ROLE_MISSING", "NOT_FOUND"

Call = Callable[["Town"], Awaitable[object]]


@dataclass(frozen=True, kw_only=True)
class Town:
    """The caller's project, another one of its organization, and one of another organization."""

    mesh: Mesh
    mine: Customer
    sibling: Customer
    foreign: Customer

    def stub(self, kind: Any) -> Any:
        return kind(self.mesh.channels["gateway"])


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def town(mesh: Mesh) -> AsyncIterator[Town]:
    whose = {
        "mine": Customer(mesh=mesh, organization="org_town", project="proj_mine"),
        "sibling": Customer(mesh=mesh, organization="org_town", project="proj_sibling"),
        "foreign": Customer(mesh=mesh, organization="org_foreign", project="proj_foreign"),
    }
    usage_time = Timestamp()
    usage_time.FromDatetime(DAY)
    for name, customer in whose.items():
        for minute in range(MINUTES[name]):
            await mesh.publish(
                usage_events_pb2.EndpointMinuteRecorded(
                    work_key=f"ep_{name}:1:{minute}",
                    endpoint=f"projects/{customer.project}/endpoints/ep_{name}",
                    project_id=customer.project,
                    organization_id=customer.organization,
                    hardware_type="nvidia-h100-80gb",
                    device_count=1,
                    minute=minute,
                    usage_time=usage_time,
                )
            )
    booked = "SELECT count(*) FROM usage_records WHERE organization_id IN ('org_town', 'org_foreign')"
    await mesh.until(booked, sum(MINUTES.values()))
    yield Town(mesh=mesh, **whose)


async def drained(call: Any) -> None:
    async for _ in call:
        pass


def invoice(organization: str) -> str:
    return f"organizations/{organization}/invoices/{MONTH}"


def get_invoice(whose: str) -> Call:
    request = billing_service_pb2.GetInvoiceRequest(name=invoice(whose))
    return lambda town: town.mesh.billing.GetInvoice(request)


def render_invoice(whose: str) -> Call:
    return lambda town: town.stub(InvoiceServiceStub).RenderInvoice(pb.RenderInvoiceRequest(name=invoice(whose)))


def journal(whose: str) -> Call:
    request = ledger_service_pb2.ExportJournalRequest(organization=f"organizations/{whose}")
    return lambda town: drained(town.stub(LedgerServiceStub).ExportJournal(request))


def verification(whose: str) -> Call:
    request = ledger_service_pb2.VerifyLedgerRequest(organization=f"organizations/{whose}")
    return lambda town: drained(town.stub(LedgerServiceStub).VerifyLedger(request))


def of_invoices(method: str, request: Any) -> Call:
    return lambda town: getattr(town.stub(InvoiceServiceStub), method)(request)


def usage(project: str) -> Call:
    request = billing_service_pb2.ListUsageRecordsRequest(parent=f"projects/{project}")
    return lambda town: town.mesh.billing.ListUsageRecords(request)


def export(project: str) -> Call:
    request = pb.ExportUsageRequest(parent=f"projects/{project}", billing_month=MONTH)
    return lambda town: drained(town.stub(InvoiceServiceStub).ExportUsage(request))


def budgets(project: str) -> Call:
    request = budget_service_pb2.ListBudgetsRequest(parent=f"projects/{project}")
    return lambda town: town.stub(BudgetServiceStub).ListBudgets(request)


def charge(project: str) -> Call:
    request = billing_service_pb2.GetJobChargeRequest(tuning_job=f"projects/{project}/tuningJobs/ft-none")
    return lambda town: town.mesh.billing.GetJobCharge(request)


# What is asked for, and what a member and an admin of `proj_mine` are told.
CELLS: dict[str, tuple[Call, str, str]] = {
    "invoice of the organization": (get_invoice("org_town"), ROLE_MISSING, SHOWN),
    "invoice of another": (get_invoice("org_foreign"), ROLE_MISSING, NOT_FOUND),
    "document of the organization": (render_invoice("org_town"), ROLE_MISSING, SHOWN),
    "document of another": (render_invoice("org_foreign"), ROLE_MISSING, NOT_FOUND),
    "list of invoices": (of_invoices("ListInvoices", pb.ListInvoicesRequest()), ROLE_MISSING, SHOWN),
    "credit notes": (of_invoices("ListCreditNotes", pb.ListCreditNotesRequest()), ROLE_MISSING, SHOWN),
    "billing profile": (of_invoices("GetBillingProfile", pb.GetBillingProfileRequest()), ROLE_MISSING, SHOWN),
    "journal of the organization": (journal("org_town"), ROLE_MISSING, SHOWN),
    "journal of another": (journal("org_foreign"), ROLE_MISSING, ROLE_MISSING),
    "verification of the organization": (verification("org_town"), ROLE_MISSING, SHOWN),
    "verification of another": (verification("org_foreign"), ROLE_MISSING, ROLE_MISSING),
    "balance": (lambda town: town.mesh.billing.GetBalance(billing_service_pb2.GetBalanceRequest()), SHOWN, SHOWN),
    "usage of the own project": (usage("proj_mine"), SHOWN, SHOWN),
    "usage of a sibling": (usage("proj_sibling"), NOT_FOUND, NOT_FOUND),
    "usage of a stranger": (usage("proj_foreign"), NOT_FOUND, NOT_FOUND),
    "export of the own project": (export("proj_mine"), SHOWN, SHOWN),
    "export of a sibling": (export("proj_sibling"), NOT_FOUND, NOT_FOUND),
    "export of a stranger": (export("proj_foreign"), NOT_FOUND, NOT_FOUND),
    "budgets of the own project": (budgets("proj_mine"), SHOWN, SHOWN),
    "budgets of a sibling": (budgets("proj_sibling"), NOT_FOUND, NOT_FOUND),
    "budgets of a stranger": (budgets("proj_foreign"), NOT_FOUND, NOT_FOUND),
    "charge of a sibling's job": (charge("proj_sibling"), NOT_FOUND, NOT_FOUND),
    "charge of a stranger's job": (charge("proj_foreign"), NOT_FOUND, NOT_FOUND),
}


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("role", ["member", "admin"])
async def test_who_sees_what(town: Town, cell: str, role: str) -> None:
    call, *told = CELLS[cell]
    roles = ("member",) if role == "member" else ("member", "admin")
    with town.mine.calling(*roles):
        try:
            await call(town)
            outcome = SHOWN
        except DomainError as refusal:
            outcome = refusal.reason
    assert outcome == told[role == "admin"]


@pytest.mark.parametrize(
    ("role", "named", "minutes"),
    [
        ("member", "", MINUTES["mine"]),
        ("member", "proj_mine", MINUTES["mine"]),
        ("member", "proj_sibling", None),
        ("member", "proj_foreign", None),
        ("member", "proj_none", None),
        ("admin", "", MINUTES["mine"] + MINUTES["sibling"]),
        ("admin", "proj_mine", MINUTES["mine"]),
        ("admin", "proj_sibling", MINUTES["sibling"]),
        ("admin", "proj_foreign", 0),
    ],
)
async def test_whose_costs_are_summed(town: Town, role: str, named: str, minutes: int | None) -> None:
    request = pb.QueryCostsRequest(project_id=named, group_by=[pb.COST_DIMENSION_PROJECT], **DAYS)
    with town.mine.calling(role):
        try:
            total = (await town.stub(InvoiceServiceStub).QueryCosts(request)).total_nanos_usd
        except DomainError as refusal:
            assert (refusal.reason, minutes) == (ROLE_MISSING, None)
            return
    assert minutes is not None
    assert total == minutes * MINUTE_NANOS_USD

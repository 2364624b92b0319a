"""Closing invoices on the real database: once, without gaps, and for good, whatever happens at the same time."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from chassis.db.pool import transaction
from chassis.errors import FailedPrecondition
from chassis.identity import Caller, acting_as
from finemesh.billing.v1 import invoice_pb2
from finemesh.billing.v1.invoice_service_pb2 import ListInvoicesRequest
from finemesh.events.v1 import billing_events_pb2
from services.billing.api.invoice_service import InvoiceService
from services.billing.calendar import Month
from services.billing.config import BillingSettings
from services.billing.invoices import crediting, invoicing
from services.billing.invoices.closer import Closer
from services.billing.invoices.crediting import Correction
from services.billing.invoices.store import ClosedInvoice, InvoiceStore
from services.billing.ledger.derived_ids import usage_record_id
from services.billing.ledger.store import LedgerStore
from services.billing.limits import Limits
from services.billing.terms import Party
from services.billing.usage import inference
from services.billing.usage.records import InferenceFact
from tests.harness.parties import others_transaction
from tests.harness.servers import PostgresServer
from tests.store.billing.conftest import fresh_world
from tests.store.billing.world import LARGE, NOW, USD, World, ended, evaluate, minute, served, train, waiting, whole_run

NOVEMBER, DECEMBER = Month(year=2026, month=11), Month(year=2026, month=12)
TERMS = BillingSettings(issuer_legal_name="Mesh Ltd", invoice_tax_note="No tax.").invoice_terms
GRACE_OVER = datetime(2026, 12, 5, tzinfo=UTC)


def jump_to(world: World, moment: datetime) -> None:
    world.clock.jump((moment - world.clock.now()).total_seconds())


async def close(world: World, organization: str, month: Month = NOVEMBER) -> ClosedInvoice:
    async with being_closed(world, organization, month) as closed:
        pass
    return closed


@asynccontextmanager
async def being_closed(world: World, organization: str, month: Month = NOVEMBER) -> AsyncIterator[ClosedInvoice]:
    """Closed by a transaction that lasts as long as the block."""
    async with others_transaction(world.pool) as connection:
        yield await invoicing.close(
            connection, world.outbox, TERMS, organization_id=organization, month=month, now=world.clock.now()
        )


async def read(world: World, organization: str, month: Month = NOVEMBER) -> invoice_pb2.Invoice:
    async with world.pool.acquire() as connection:
        return await invoicing.read(connection, TERMS, organization, month)


async def closed_events(world: World) -> list[billing_events_pb2.InvoiceClosed]:
    rows = await world.pool.fetch("SELECT payload FROM outbox WHERE subject LIKE '%billing.invoice.closed%'")
    return [billing_events_pb2.InvoiceClosed.FromString(row["payload"]) for row in rows]


async def test_an_invoice_has_a_line_for_each_job_endpoint_and_side_of_a_model(world: World) -> None:
    await world.top_up("o", 100 * USD)
    await world.hold("o")
    await world.deliver(*whole_run("o"), ended("o", "COMPLETED", 16))
    await world.hold("o", "ft-2", work=LARGE)
    await world.deliver(train("o", 0, 20, "ft-2"), evaluate("o", 1, "ft-2"), ended("o", "STOPPED_EARLY", 2, "ft-2"))
    await world.hold("o", "ft-3")
    await world.deliver(ended("o", "PLATFORM_FAILURE", 0, "ft-3"))
    await world.deliver(served("o", ("gen-1", 1000, 20), ("gen-2", 500_000, 7)), minute("o", 0), minute("o", 1))
    invoice = await read(world, "o")
    assert invoice.open
    assert [
        (line.kind, line.usage_kind, line.quantity, line.unit, line.amount_nanos_usd) for line in invoice.lines
    ] == [
        ("tuning", "", 230_000, "tokens", 1_403_000_000),
        ("minimum", "", 0, "", 3_597_000_000),
        ("tuning", "", 25_000, "tokens", 152_500_000),
        ("endpoint", "endpoint_minutes", 2, "minutes", 2_000_000),
        ("inference", "input_tokens", 501_000, "tokens", 25_050_000),
        ("inference", "output_tokens", 27, "tokens", 2_700),
    ]
    assert [line.exact_nanos_usd for line in invoice.lines] == [line.amount_nanos_usd for line in invoice.lines]
    assert [line.usage_record_count for line in invoice.lines] == [16, 0, 2, 2, 2, 2]
    assert [line.minimum_applied for line in invoice.lines] == [True, True, False, False, False, False]
    assert {line.project_id for line in invoice.lines} == {"o-p"}
    # 5.17955270 before it is rounded, once.
    assert (invoice.total_nanos_usd, invoice.rounding_nanos_usd) == (5_180_000_000, 447_300)
    assert (invoice.total.units, invoice.total.nanos) == (5, 180_000_000)
    # The names lead to the records.
    named = [name for line in invoice.lines for name in line.usage_records]
    assert len(set(named)) == 24
    async with world.pool.acquire() as connection:
        rows = await connection.fetch("SELECT project_id, work_key FROM usage_records")
    assert set(named) == {
        f"projects/{row['project_id']}/usageRecords/{usage_record_id(row['project_id'], row['work_key'])}"
        for row in rows
    }


async def test_a_closed_invoice_is_what_was_stored_and_late_usage_goes_to_the_month_of_now(world: World) -> None:
    await world.top_up("o", USD)
    await world.deliver(minute("o", 0, hardware="nvidia-h100-80gb"))
    jump_to(world, GRACE_OVER)
    closed = await close(world, "o")
    assert await close(world, "o") == closed
    assert closed.sha256 == hashlib.sha256(closed.content).digest()
    invoice = await read(world, "o")
    assert (invoice.number, invoice.open, invoice.sha256) == ("FM-000001", False, closed.sha256.hex())
    assert invoice.close_time.ToDatetime(tzinfo=UTC) == GRACE_OVER
    assert (invoice.issuer.legal_name, invoice.tax_note) == ("Mesh Ltd", "No tax.")
    invoice.ClearField("sha256")
    assert invoice.SerializeToString(deterministic=True) == closed.content

    # Used in November, heard of in December.
    await world.deliver(minute("o", 7, hardware="nvidia-h100-80gb"))
    assert (await close(world, "o")).content == closed.content
    late = await read(world, "o", DECEMBER)
    assert [(line.quantity, line.amount_nanos_usd) for line in late.lines] == [(1, 56_000_000)]
    assert len(late.lines[0].usage_records) == 1
    months = await world.pool.fetch("SELECT usage_time, billing_month FROM usage_records ORDER BY work_key")
    assert [row["billing_month"] for row in months] == [date(2026, 11, 1), date(2026, 12, 1)]
    assert all(row["usage_time"].month == 11 for row in months)
    events = await closed_events(world)
    assert [(event.number, event.organization_id, event.total_nanos_usd) for event in events] == [
        ("FM-000001", "o", 60_000_000)
    ]


async def test_a_job_that_ends_late_is_on_the_invoice_of_the_month_that_is_open(world: World) -> None:
    await world.top_up("o", 10 * USD)
    await world.hold("o")
    await world.deliver(train("o", 0, 20), minute("o", 0))
    jump_to(world, GRACE_OVER)
    closed = await close(world, "o")
    assert [line.kind for line in invoice_pb2.Invoice.FromString(closed.content).lines] == ["endpoint"]
    await world.deliver(ended("o", "CANCELLED_RUNNING", 1))
    assert (await close(world, "o")).content == closed.content
    assert [(line.kind, line.amount_nanos_usd) for line in (await read(world, "o", DECEMBER)).lines] == [
        ("tuning", 122_000_000)
    ]


async def test_two_that_close_at_once_give_one_invoice(world: World) -> None:
    await world.deliver(minute("o", 0))
    jump_to(world, GRACE_OVER)
    first, *others = await asyncio.gather(*(close(world, "o") for _ in range(6)))
    assert others == [first] * 5
    assert await world.pool.fetchval("SELECT last_number FROM document_numbers WHERE kind = 'invoice'") == 1
    assert len(await closed_events(world)) == 1


async def test_numbers_of_many_organizations_have_no_gap(world: World) -> None:
    organizations = [f"o{number:02d}" for number in range(20)]
    for organization in organizations:
        await world.deliver(minute(organization, 0))
    jump_to(world, GRACE_OVER)
    closed = await asyncio.gather(*(close(world, organization) for organization in organizations for _ in range(2)))
    assert {found.number for found in closed} == set(range(1, 21))
    stored = await world.pool.fetch("SELECT number FROM invoices ORDER BY number")
    assert [row["number"] for row in stored] == list(range(1, 21))


async def test_a_number_that_is_taken_back_is_given_again(world: World) -> None:
    await world.deliver(minute("a", 0), minute("b", 0))
    jump_to(world, GRACE_OVER)
    with pytest.raises(RuntimeError):
        async with being_closed(world, "a"):
            raise RuntimeError
    assert (await close(world, "b")).number == 1
    assert (await close(world, "a")).number == 2


async def test_the_database_itself_keeps_numbers_without_gaps(world: World) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match="no invoice has it"):
        await world.pool.execute("UPDATE document_numbers SET last_number = last_number + 1 WHERE kind = 'invoice'")
    with pytest.raises(asyncpg.CheckViolationError, match="count up by one"):
        await world.pool.execute("UPDATE document_numbers SET last_number = last_number + 2")
    with pytest.raises(asyncpg.CheckViolationError, match="taken for it"):
        await world.pool.execute(
            "INSERT INTO invoices VALUES ('o', '2026-10-01', 1, 'content', sha256('content'), 0, now())"
        )
    with pytest.raises(asyncpg.CheckViolationError, match="content_matches_digest"):
        await world.pool.execute("INSERT INTO invoices VALUES ('o', '2026-10-01', 1, 'content', sha256('c'), 0, now())")


@pytest.mark.parametrize("table", ["invoices", "credit_notes"])
async def test_documents_are_immutable(world: World, postgres: PostgresServer, table: str) -> None:
    for statement in (f"UPDATE {table} SET number = 7", f"DELETE FROM {table}", f"TRUNCATE {table}"):  # noqa: S608
        with pytest.raises((asyncpg.RestrictViolationError, asyncpg.InsufficientPrivilegeError)):
            await world.pool.execute(statement)


async def test_a_running_month_and_an_empty_one_are_not_closed(world: World) -> None:
    await world.deliver(minute("o", 0))
    # Clocks may differ by an hour: so long after its end a month may still be booked into.
    for moment in (NOW, datetime(2026, 12, 1, 0, 59, 59, tzinfo=UTC)):
        jump_to(world, moment)
        with pytest.raises(FailedPrecondition, match="can be closed from 2026-12-01 01:00 UTC"):
            await close(world, "o")
    jump_to(world, datetime(2026, 12, 1, 1, tzinfo=UTC))
    with pytest.raises(FailedPrecondition, match="nothing to close"):
        await close(world, "o", Month(year=2026, month=10))
    with pytest.raises(FailedPrecondition, match="nothing to close"):
        await close(world, "nobody")
    assert (await close(world, "o")).number == 1
    assert await world.pool.fetchval("SELECT count(*) FROM chains WHERE organization_id = 'nobody'") == 0


async def test_closing_waits_for_what_is_being_booked(world: World) -> None:
    await world.deliver(minute("o", 0))
    jump_to(world, GRACE_OVER)
    async with others_transaction(world.pool) as connection:
        await world.handle(connection, minute("o", 1))
        closing = asyncio.create_task(close(world, "o"))
        await waiting(world)
    (line,) = invoice_pb2.Invoice.FromString((await closing).content).lines
    assert line.quantity == 2


async def test_booking_waits_for_what_is_being_closed(world: World) -> None:
    await world.deliver(minute("o", 0))
    jump_to(world, GRACE_OVER)
    async with being_closed(world, "o"):
        booking = asyncio.create_task(world.deliver(minute("o", 1)))
        await waiting(world)
    await booking
    assert [line.quantity for line in (await read(world, "o")).lines] == [1]
    assert [line.quantity for line in (await read(world, "o", DECEMBER)).lines] == [1]


async def test_served_calls_wait_for_what_is_being_closed(world: World) -> None:
    """They are priced before the lock, for the months that were open then."""
    await world.deliver(minute("o", 0))
    jump_to(world, GRACE_OVER)
    async with being_closed(world, "o"):
        booking = asyncio.create_task(world.deliver(served("o", ("gen-1", 10**6, 20))))
        await waiting(world)
    await booking
    assert [line.kind for line in (await read(world, "o")).lines] == ["endpoint"]
    assert [line.quantity for line in (await read(world, "o", DECEMBER)).lines] == [10**6, 20]
    rows = await world.pool.fetch("SELECT DISTINCT billing_month FROM usage_records WHERE kind <> 'endpoint_minutes'")
    assert [row["billing_month"] for row in rows] == [DECEMBER.first_day]


async def test_the_customer_is_who_the_profile_names_when_the_invoice_is_closed(world: World) -> None:
    party = Party(legal_name="Acme GmbH", address_lines=("Weg 1", "Berlin"), tax_id="DE1", email="a@b.example")
    await world.deliver(minute("o", 0))
    async with world.pool.acquire() as connection:
        await InvoiceStore(connection).save_profile("o", party, NOW)
    jump_to(world, GRACE_OVER)
    await close(world, "o")
    async with world.pool.acquire() as connection:
        await InvoiceStore(connection).save_profile("o", Party(legal_name="Other"), NOW)
        assert (await InvoiceStore(connection).get_profile("o")).legal_name == "Other"
    customer = (await read(world, "o")).customer
    assert (customer.legal_name, list(customer.address_lines), customer.tax_id) == (
        "Acme GmbH",
        ["Weg 1", "Berlin"],
        "DE1",
    )


async def test_what_the_credit_did_not_cover_is_on_the_invoice(world: World) -> None:
    await world.top_up("o", 400_000)
    await world.deliver(minute("o", 0))
    jump_to(world, GRACE_OVER)
    await close(world, "o")
    await world.top_up("o", USD, "second")
    assert (await read(world, "o")).owed_nanos_usd == 600_000


async def test_only_so_many_records_are_named(world: World) -> None:
    await world.deliver(served("o", *((f"gen-{number:03d}", 1, 1) for number in range(130))))
    invoice = await read(world, "o")
    assert [(line.usage_record_count, len(line.usage_records)) for line in invoice.lines] == [(130, 100)] * 2
    terms = BillingSettings(invoice_names_max=6, invoice_names_scan_max=4).invoice_terms
    async with world.pool.acquire() as connection:
        few = await invoicing.read(connection, terms, "o", NOVEMBER)
    # Four records are looked at, two of each side, and three of each could be named.
    assert [len(line.usage_records) for line in few.lines] == [2, 2]
    assert few.total_nanos_usd == invoice.total_nanos_usd


async def test_the_closer_closes_what_is_due_after_the_grace_and_stops_for_nobody(
    world: World, postgres: PostgresServer
) -> None:
    settings = BillingSettings(invoice_close_batch_max=2, invoice_lines_max=3)
    closers = [Closer(world.pool, world.outbox, settings, clock=world.clock) for _ in range(2)]
    for organization in ("a", "b", "c", "d", "e"):
        await world.deliver(minute(organization, 0))
    # Too many lines for one invoice: it stays open, and the others do not wait for it.
    await world.deliver(served("c", ("gen-1", 5, 5)), served("c", ("gen-2", 5, 5), model="acme/other"))
    # Nor for one that no invoice can be named after, booked by a version that took such an event.
    odd = InferenceFact(
        work_key="gen-1",
        organization_id="a corp",
        project_id="p",
        resource="acme/bot",
        usage_time=NOW,
        base_model="finemesh/demo-llama",
        input_tokens=5,
        output_tokens=5,
    )
    async with transaction(world.pool) as connection:
        await inference.book_inference(connection, world.catalogue, [odd], NOW)
    # A month with tokens of a job that is still running has no charges.
    await world.top_up("f", 5 * USD)
    await world.hold("f")
    await world.deliver(train("f", 0, 20))
    for moment, expected in (
        (datetime(2026, 12, 3, 23, 59, tzinfo=UTC), set()),
        (datetime(2026, 12, 4, tzinfo=UTC), {"a", "b", "d", "e"}),
    ):
        jump_to(world, moment)
        await asyncio.gather(*(closer.close_due() for closer in closers))
        rows = await world.pool.fetch("SELECT organization_id, number FROM invoices")
        assert {row["organization_id"] for row in rows} == expected
    assert {row["number"] for row in rows} == {1, 2, 3, 4}
    assert await Closer(world.pool, world.outbox, BillingSettings(), clock=world.clock).close_due() == 1


async def test_invoices_are_listed_newest_first_with_those_that_are_open(world: World) -> None:
    await world.deliver(minute("o", 0, hardware="nvidia-h100-80gb"))
    jump_to(world, datetime(2027, 2, 3, tzinfo=UTC))
    late = minute("o", 1, hardware="nvidia-h100-80gb")
    late.usage_time.FromDatetime(datetime(2027, 1, 5))  # type: ignore[attr-defined]
    await world.deliver(late)
    await close(world, "o")

    async def heads(before: date | None, row_max: int = 10) -> list[tuple[str, str, int]]:
        async with world.pool.acquire() as connection:
            found = await invoicing.list_heads(
                connection, "o", before=before, running=Month.of(world.clock.now()), row_max=row_max
            )
        assert not any(head.lines for head in found)
        return [(head.name.rpartition("/")[2], head.number, head.total_nanos_usd) for head in found]

    everything = [("2027-02", "", 0), ("2027-01", "", 60_000_000), ("2026-11", "FM-000001", 60_000_000)]
    assert await heads(None) == everything
    assert await heads(None, 1) == everything[:1]
    assert await heads(date(2027, 2, 1), 1) == everything[1:2]
    assert await heads(date(2027, 1, 1)) == everything[2:]
    assert await heads(date(2026, 11, 1)) == []


async def test_an_open_month_is_listed_with_the_total_of_its_invoice_however_many_lines_it_has(world: World) -> None:
    await world.top_up("o", 100 * USD)
    await world.hold("o", work=LARGE)
    await world.deliver(train("o", 0, 20), evaluate("o", 1), ended("o", "STOPPED_EARLY", 2), minute("o", 0))
    # At 50 nano-dollars a token these are half a cent, one and a half, two and a half, on lines of their own.
    for number, tokens in enumerate((100_000, 300_000, 500_000)):
        await world.deliver(served("o", (f"gen-{number}", tokens, 0), model=f"acme/bot-{number}"))
    correction = Correction(
        organization_id="o",
        request_id="r",
        amount_nanos_usd=25_000_000,
        reason="we were slow",
        resource="",
        invoice="",
        month=None,
    )
    async with transaction(world.pool) as connection:
        await crediting.give_back(connection, world.outbox, correction, now=NOW, limits=Limits())
    invoice = await read(world, "o")
    assert [line.amount_nanos_usd for line in invoice.lines] == [
        152_500_000,
        1_000_000,
        5_000_000,
        15_000_000,
        25_000_000,
    ]
    # 0.1985 less 0.025.
    assert invoice.total_nanos_usd == 170_000_000
    for field in ("lines", "credit_notes", "issuer", "customer", "tax_note", "rounding", "rounding_nanos_usd"):
        invoice.ClearField(field)
    # No organization is named here.
    nobody: Any = None
    for lines_max in (6, 1):
        settings = BillingSettings(invoice_lines_max=lines_max)
        service = InvoiceService(world.pool, settings, world.outbox, nobody, clock=world.clock)
        with acting_as(Caller(service="gateway", account="o", roles=frozenset({"admin"}))):
            assert list((await service.ListInvoices(ListInvoicesRequest(), None)).invoices) == [invoice]


async def test_which_invoices_are_closed_changes_no_entry(world: World, postgres: PostgresServer) -> None:
    """A replay meets other open months than the first time, and still writes the same ledger."""
    message = served("o", ("gen-1", 10**6, 20), ("gen-2", 10**6, 5), ("gen-3", 10**6, 7))
    for record, moment in zip(
        message.records,
        (NOW, datetime(2026, 12, 2, tzinfo=UTC), datetime(2026, 11, 30, 23, tzinfo=UTC)),
        strict=True,
    ):
        record.usage_time.FromDatetime(moment)
    ledgers = []
    async with fresh_world(postgres) as other:
        for each in (world, other):
            await each.deliver(minute("o", 0))
            jump_to(each, GRACE_OVER)
            if each is world:
                await close(each, "o")
            await each.deliver(message)
            async with each.pool.acquire() as connection:
                ledgers.append([row async for row in LedgerStore(connection).dump()])
    assert ledgers[0] == ledgers[1]
    # One entry for each month of use, whichever invoice has it.
    assert await world.pool.fetchval("SELECT count(*) FROM transactions WHERE kind = 'inference'") == 2
    assert {
        (row["work_key"], row["billing_month"].month)
        for row in await world.pool.fetch(
            "SELECT work_key, billing_month FROM usage_records WHERE kind = 'input_tokens'"
        )
    } == {("gen-1:input", 12), ("gen-2:input", 12), ("gen-3:input", 12)}
    assert len((await read(world, "o", DECEMBER)).lines) == 2


async def test_a_replay_into_an_empty_database_gives_the_same_invoice(world: World, postgres: PostgresServer) -> None:
    events = [served("o", ("gen-1", 10**6, 20)), minute("o", 0, hardware="nvidia-h100-80gb"), minute("o", 1)]
    contents = []
    async with fresh_world(postgres) as other:
        for replayed, order in ((world, events), (other, events[::-1])):
            await replayed.deliver(*order)
            jump_to(replayed, GRACE_OVER + timedelta(seconds=1))
            contents.append((await close(replayed, "o")).content)
    assert contents[0] == contents[1]

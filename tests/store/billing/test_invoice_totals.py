"""What an invoice says is what the ledger debited, to the cent, whatever was used; and invoices that were closed when
each line was rounded stay as they are."""

import csv
import hashlib
import io
import itertools
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chassis.db.pool import transaction
from finemesh.billing.v1 import invoice_pb2
from services.billing.audit.verification import Verification
from services.billing.calendar import Month
from services.billing.config import BillingSettings
from services.billing.invoices import crediting, invoicing
from services.billing.invoices.convert import encode
from services.billing.invoices.crediting import Correction
from services.billing.invoices.documents.csv_file import to_csv
from services.billing.invoices.invoice import Invoice, Rounding, build_lines
from services.billing.invoices.store import ClosedInvoice, InvoiceStore
from services.billing.limits import Limits
from services.billing.prices.pricing import Work
from tests.store.billing.world import NOW, SMALL, USD, World, ended, evaluate, minute, served, train, whole_run

NOVEMBER = Month(year=2026, month=11)
DECEMBER_5 = datetime(2026, 12, 5, tzinfo=UTC)
TERMS = BillingSettings().invoice_terms
HALF_A_CENT = 5_000_000

_numbers = itertools.count()
# Few tokens and many, so that lines are worth a few nano-dollars or many dollars.
tokens = st.one_of(st.integers(0, 2_000), st.integers(0, 10**8))
calls = st.tuples(st.sampled_from("abc"), st.sampled_from(["acme/bot", "acme/other"]), tokens, tokens)
minutes = st.sampled_from(["cpu", "nvidia-h100-80gb", "nvidia-l40s-48gb"])
# Tokens of a step, steps that were done of a hundred, and how the job ended.
jobs = st.tuples(
    st.integers(1, 200_000), st.integers(1, 99), st.sampled_from(["COMPLETED", "STOPPED_EARLY", "CANCELLED_RUNNING"])
)
credits_ = st.integers(1, 3 * USD)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(calls, max_size=8),
    st.lists(minutes, max_size=3),
    st.lists(jobs, max_size=3),
    st.lists(credits_, max_size=3),
)
async def test_the_invoice_comes_to_what_was_debited_to_the_cent(
    world: World,
    called: list[tuple[str, str, int, int]],
    hardware: list[str],
    ran: list[tuple[int, int, str]],
    given_back: list[int],
) -> None:
    organization = f"o{next(_numbers)}"
    await world.top_up(organization, 10_000 * USD)
    for number, (project, model, read_tokens, written) in enumerate(called):
        message = served(organization, (f"gen-{number}", read_tokens, written), model=model)
        message.records[0].project_id = f"{organization}-{project}"
        await world.deliver(message)
    for number, kind in enumerate(hardware):
        await world.deliver(minute(organization, number, hardware=kind))
    for number, (per_step, done, ending) in enumerate(ran):
        await _run(world, organization, f"ft-{number}", per_step, 100 if ending == "COMPLETED" else done, ending)
    earned = (await world.balances(organization)).get("revenue", 0)
    for number, amount in enumerate(given_back):
        if amount <= earned:
            await _give_back(world, organization, amount, f"r{number}")
            earned -= amount

    debited = (await world.balances(organization)).get("revenue", 0)
    async with world.pool.acquire() as connection:
        invoice = await invoicing.read(connection, TERMS, organization, NOVEMBER)
        (head,) = await invoicing.list_heads(connection, organization, before=None, running=NOVEMBER, row_max=5)
    lines = sum(line.amount_nanos_usd for line in invoice.lines)
    assert lines - sum(note.amount_nanos_usd for note in invoice.credit_notes) == debited
    assert invoice.total_nanos_usd == debited + invoice.rounding_nanos_usd == head.total_nanos_usd
    assert abs(invoice.rounding_nanos_usd) <= HALF_A_CENT
    assert invoice.total_nanos_usd % (2 * HALF_A_CENT) == 0
    *rows, total = csv.DictReader(io.StringIO(to_csv(invoice).decode(), newline=""))
    assert sum(Decimal(row["amount"]) for row in rows) == Decimal(total["amount"])
    await _check_minimums(world, organization, invoice)


async def _run(world: World, organization: str, job: str, per_step: int, done: int, ending: str) -> None:
    """A job of a hundred steps and one evaluation, of which `done` steps are reported in pieces of thirty."""
    work = Work(
        base_model=SMALL.base_model,
        method=SMALL.method,
        training_tokens=100 * per_step,
        validation_tokens=per_step,
        epochs=1,
        evaluations=1,
    )
    await world.hold(organization, job, work)
    bounds = [*range(0, done, 30), done]
    run = [train(organization, *steps, job, tokens_per_step=per_step) for steps in itertools.pairwise(bounds)]
    if ending == "COMPLETED":
        run.append(evaluate(organization, 1, job, tokens=per_step))
    await world.deliver(*run, ended(organization, ending, len(run), job))


async def _give_back(world: World, organization: str, amount: int, request_id: str) -> None:
    correction = Correction(
        organization_id=organization,
        request_id=request_id,
        amount_nanos_usd=amount,
        reason="we were slow",
        resource="",
        invoice="",
        month=None,
    )
    async with transaction(world.pool) as connection:
        await crediting.give_back(connection, world.outbox, correction, now=NOW, limits=Limits())


async def _check_minimums(world: World, organization: str, invoice: invoice_pb2.Invoice) -> None:
    """A job's line is what its records are worth; where it pays more, the minimum is the next line."""
    charged = await world.pool.fetch(
        "SELECT resource, charged_nanos_usd, adjustment_nanos_usd, minimum_applied FROM holds"
        " WHERE organization_id = $1 AND charged_nanos_usd > 0",
        organization,
    )
    for row in charged:
        lines = [line for line in invoice.lines if line.resource == row["resource"]]
        assert sum(line.amount_nanos_usd for line in lines) == row["charged_nanos_usd"]
        lifted = row["minimum_applied"] and row["adjustment_nanos_usd"] > 0
        assert [line.kind for line in lines] == ["tuning", *["minimum"] * lifted]
        if lifted:
            assert lines[1].amount_nanos_usd == row["adjustment_nanos_usd"]
            assert row["charged_nanos_usd"] == 5 * USD


async def test_an_invoice_that_was_closed_with_rounded_lines_stays_as_it_is(world: World) -> None:
    """As the version before closed it: each line to the cent, the minimum on the job's own line."""
    await world.top_up("o", 100 * USD)
    await world.hold("o")
    await world.deliver(*whole_run("o"), ended("o", "COMPLETED", 16))
    await world.deliver(*(minute("o", number, hardware="nvidia-h100-80gb") for number in range(3)))
    await world.deliver(served("o", ("gen-1", 98_000, 0)))
    world.clock.jump((DECEMBER_5 - world.clock.now()).total_seconds())
    async with transaction(world.pool) as connection:
        store = InvoiceStore(connection)
        charges = await store.list_charges("o", NOVEMBER.first_day, row_max=10)
        before = Invoice(
            organization_id="o",
            month=NOVEMBER,
            lines=build_lines(charges, Rounding.LINES),
            rounding=Rounding.LINES,
            number=await store.take_number("invoice"),
            close_time=world.clock.now(),
        )
        # 5 dollars for the job, three minutes for 0.168, and 0.0049 for the tokens.
        assert [line.amount_nanos_usd for line in before.lines] == [5 * USD, 170_000_000, 0]
        worded = replace(before.lines[0], description="Tuning of m, job ft-1, minimum per completed job")
        content = encode(replace(before, lines=(worded, *before.lines[1:])))
        closed = ClosedInvoice(
            billing_month=NOVEMBER.first_day,
            number=1,
            content=content,
            sha256=hashlib.sha256(content).digest(),
            total_nanos_usd=5_170_000_000,
            close_time=world.clock.now(),
        )
        await store.insert_invoice("o", closed)
        read = await invoicing.read(connection, TERMS, "o", NOVEMBER)
    stored = invoice_pb2.Invoice.FromString(content)
    assert not {"rounding", "rounding_nanos_usd"} & {field.name for field, _ in stored.ListFields()}
    read.ClearField("sha256")
    assert read == stored
    verification = Verification(world.pool, "o", batch_rows=10, timeout_s=60, names_scan_max=10)
    async for _ in verification.run():
        pass
    assert verification.progress.difference is None


async def test_a_closed_invoice_shows_the_minimum_and_is_rebuilt(world: World) -> None:
    await world.top_up("o", 100 * USD)
    await world.hold("o")
    await world.deliver(*whole_run("o"), ended("o", "COMPLETED", 16))
    world.clock.jump((DECEMBER_5 - world.clock.now()).total_seconds())
    now = world.clock.now()
    async with transaction(world.pool) as connection:
        closed = await invoicing.close(connection, world.outbox, TERMS, organization_id="o", month=NOVEMBER, now=now)
    lines = invoice_pb2.Invoice.FromString(closed.content).lines
    # 230,000 tokens at 6.10 dollars per million, and what lifts that to 5 dollars.
    assert [(line.kind, line.amount_nanos_usd, line.usage_record_count, len(line.usage_records)) for line in lines] == [
        ("tuning", 1_403_000_000, 16, 16),
        ("minimum", 3_597_000_000, 0, 0),
    ]
    verification = Verification(world.pool, "o", batch_rows=10, timeout_s=60, names_scan_max=10)
    async for _ in verification.run():
        pass
    assert verification.progress.difference is None

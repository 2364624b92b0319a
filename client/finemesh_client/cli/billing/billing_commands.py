"""`finemesh billing`: balance, top-ups, usage and jobs; estimates are `estimate.py`, documents `invoices.py`."""

from __future__ import annotations

import enum
from decimal import Decimal, InvalidOperation
from typing import Annotated

import typer
from rich.text import Text

from finemesh.billing.v1 import balance_pb2, invoice_pb2, usage_record_pb2
from finemesh_client.billing import NANOS_PER_DOLLAR, dollars
from finemesh_client.cli.output import console, fields, print_json, state, table, when
from finemesh_client.cli.runtime import AsJson, Limit, with_client
from finemesh_client.client import Client

# No mesh takes more in one amount, whatever its amount_nanos_usd_max is.
DOLLARS_MAX = 10**9
app = typer.Typer(no_args_is_help=True, help="Prices, prepaid balance, usage and invoices.")


class Kind(enum.StrEnum):
    """What was used."""

    TRAINING_TOKENS = "training_tokens"
    EVALUATION_TOKENS = "evaluation_tokens"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    ENDPOINT_MINUTES = "endpoint_minutes"
    CLUSTER_HOURS = "cluster_hours"


@app.command()
def balance(as_json: AsJson = False) -> None:
    """Show the prepaid balance."""

    async def work(mesh: Client) -> None:
        found = await mesh.billing.balance()
        if as_json:
            return print_json(found)
        return fields(
            [
                ("organization", found.organization),
                ("available", dollars(found.available_nanos_usd)),
                ("held", dollars(found.held_nanos_usd)),
                ("owed", dollars(found.owed_nanos_usd) if found.owed_nanos_usd else ""),
                ("credit", state(balance_pb2.CreditState.Name(found.credit_state), "CREDIT_STATE_")),
                ("low below", dollars(found.low_balance_nanos_usd) if found.low_balance_nanos_usd else ""),
            ]
        )

    with_client(work, as_json)


def to_nanos(amount: str) -> int:
    """Nano-dollars of a decimal amount such as `25.50`; exact, or refused."""
    try:
        given = Decimal(amount.removeprefix("$"))
    except InvalidOperation:
        given = Decimal("NaN")
    if not given.is_finite():
        raise typer.BadParameter(f"{amount!r} is no amount of dollars")
    # Compared before it is multiplied: an exponent can make a number that no arithmetic takes.
    if not 0 < given <= DOLLARS_MAX:
        raise typer.BadParameter(f"must be above 0 and at most {DOLLARS_MAX:,} dollars")
    if given != given.quantize(Decimal(1) / NANOS_PER_DOLLAR):
        raise typer.BadParameter("must have at most 9 decimal places")
    return int(given * NANOS_PER_DOLLAR)


@app.command("top-up")
def top_up(
    amount: Annotated[str, typer.Argument(help="Dollars, for example 25 or 25.50.")],
    organization: Annotated[str, typer.Option("--organization", help="organizations/...; your own by default.")] = "",
    request_id: Annotated[str, typer.Option("--request-id", help="Makes a repeated call count once.")] = "",
    as_json: AsJson = False,
) -> None:
    """Add prepaid credit. Needs the operator role."""
    nanos_usd = to_nanos(amount)

    async def work(mesh: Client) -> None:
        found = await mesh.billing.top_up(nanos_usd, organization=organization, request_id=request_id or None)
        print_json(found) if as_json else fields([("available", dollars(found.available_nanos_usd))])

    with_client(work, as_json)


@app.command()
def usage(
    resource: Annotated[str, typer.Option("--resource", help="Only this job, endpoint or model.")] = "",
    kind: Annotated[list[Kind] | None, typer.Option("--kind", help="Only these kinds; repeatable.")] = None,
    model: Annotated[str, typer.Option("--model", help="Only this base model or hardware type.")] = "",
    key: Annotated[str, typer.Option("--key", help="Only this API key, its id or name.")] = "",
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """List usage records, newest first. To write them all to a file use `finemesh billing export-usage`."""
    kinds = [usage_record_pb2.UsageKind.Value(f"USAGE_KIND_{each.name}") for each in kind or ()]

    async def work(mesh: Client) -> None:
        found = mesh.billing.usage(resource, limit, kinds=kinds, model=model, api_key_id=key.rpartition("/")[2])
        records = [record async for record in found]
        if as_json:
            return print_json(records)
        rows = [
            (
                when(r.usage_time),
                usage_record_pb2.UsageKind.Name(r.kind).removeprefix("USAGE_KIND_").lower(),
                r.work_key,
                f"{r.quantity:,}",
                dollars(r.amount_nanos_usd),
            )
            for r in records
        ]
        return table("usage", ("time", "kind", "work", "quantity", "amount"), rows)

    with_client(work, as_json)


def show_invoice(invoice: invoice_pb2.Invoice) -> None:
    """An invoice for people."""
    rows = [
        (
            line.description,
            f"{line.quantity:,} {line.unit}" if line.unit else "",
            f"{line.usage_record_count} records" if line.unit else "",
            dollars(line.amount_nanos_usd),
        )
        for line in invoice.lines
    ]
    rows += [
        (f"Credit note {note.number}: {note.reason}", "", "", dollars(-note.amount_nanos_usd))
        for note in invoice.credit_notes
    ]
    if invoice.rounding_nanos_usd:
        rows.append(("Rounding to the cent", "", "", dollars(invoice.rounding_nanos_usd)))
    title = f"{invoice.name} ({'open' if invoice.open else invoice.number})"
    table(title, ("line", "quantity", "usage", "amount"), rows)
    console.print(Text.assemble("total ", (dollars(invoice.total_nanos_usd), "bold")))


@app.command()
def job(name: Annotated[str, typer.Argument(help="projects/.../tuningJobs/ft-...")], as_json: AsJson = False) -> None:
    """Show a job's money: quote, hold, cost so far while it runs, charge, release."""

    async def work(mesh: Client) -> None:
        charge = await mesh.billing.job_charge(name)
        if as_json:
            return print_json(charge)
        return fields(
            [
                ("quoted", dollars(charge.quoted_nanos_usd)),
                ("held", dollars(charge.held_nanos_usd)),
                ("charged", dollars(charge.charged_nanos_usd) if charge.settled else "not settled yet"),
                ("released", dollars(charge.released_nanos_usd) if charge.settled else ""),
                ("booked so far", f"{dollars(charge.accrued_nanos_usd)}, before any minimum"),
                ("tokens", f"{charge.training_tokens:,} trained, {charge.evaluation_tokens:,} evaluated"),
                ("price book", charge.price_book_version),
            ]
        )

    with_client(work, as_json)

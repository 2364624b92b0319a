"""`finemesh billing`: estimates, balance, usage and invoices."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Annotated

import typer

from finemesh.billing.v1 import billing_service_pb2, money_pb2
from finemesh_client.billing import NANOS_PER_DOLLAR, dollars
from finemesh_client.cli.output import console, fields, print_json, table, when
from finemesh_client.cli.runtime import AsJson, Limit, with_client
from finemesh_client.client import Client

app = typer.Typer(no_args_is_help=True, help="Prices, prepaid balance, usage and invoices.")


@app.command()
def estimate(
    model: Annotated[str, typer.Option("--model", "-m", help="Base model id.")],
    training_tokens: Annotated[int, typer.Option("--training-tokens", min=0, help="Tokens of one epoch.")],
    validation_tokens: Annotated[int, typer.Option("--validation-tokens", min=0, help="Held-out tokens.")] = 0,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the data.")] = 1,
    evaluations: Annotated[int, typer.Option("--evaluations", min=0, help="Evaluations per epoch.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="All weights instead of a LoRA adapter.")] = False,
    price_book: Annotated[str, typer.Option("--price-book", help="Version of the price book.")] = "",
    parameter_count: Annotated[int, typer.Option("--parameters", min=0, help="Weights of the model.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Price a tuning job from numbers. For a real dataset use `finemesh jobs create --quote`."""

    async def work(mesh: Client) -> None:
        kind = billing_service_pb2.TRAINING_KIND_SFT_FULL if full else billing_service_pb2.TRAINING_KIND_SFT_LORA
        price = await mesh.billing.estimate(
            billing_service_pb2.EstimatePriceRequest(
                base_model=model,
                training_kind=kind,
                training_tokens=training_tokens,
                validation_tokens=validation_tokens,
                epochs=epochs,
                evaluations=evaluations,
                price_book_version=price_book,
                parameter_count=parameter_count,
            )
        )
        if as_json:
            return print_json(price)
        rows = [(t.description, f"{t.quantity:,}", dollars(t.amount_nanos_usd)) for t in price.terms]
        table(f"estimate (price book {price.price_book_version})", ("term", "quantity", "amount"), rows)
        return console.print(f"total [bold]{dollars(price.total_nanos_usd)}[/bold]")

    with_client(work, as_json)


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
            ]
        )

    with_client(work, as_json)


def to_nanos(amount: str) -> int:
    """Nano-dollars of a decimal amount such as `25.50`; exact, or refused."""
    try:
        nanos = Decimal(amount.removeprefix("$")) * NANOS_PER_DOLLAR
    except InvalidOperation:
        raise typer.BadParameter(f"{amount!r} is no amount of dollars") from None
    if nanos != nanos.to_integral_value() or nanos <= 0:
        raise typer.BadParameter("must be above 0 and have at most 9 decimal places")
    return int(nanos)


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
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """List usage records, newest first."""

    async def work(mesh: Client) -> None:
        records = [record async for record in mesh.billing.usage(resource, limit)]
        if as_json:
            return print_json(records)
        rows = [
            (
                when(r.usage_time),
                money_pb2.UsageKind.Name(r.kind).removeprefix("USAGE_KIND_").lower(),
                r.work_key,
                f"{r.quantity:,}",
                dollars(r.amount_nanos_usd),
            )
            for r in records
        ]
        return table("usage", ("time", "kind", "work", "quantity", "amount"), rows)

    with_client(work, as_json)


def show_invoice(invoice: money_pb2.Invoice) -> None:
    """An invoice for people."""
    rows = [
        (
            line.description,
            f"{line.quantity:,} {line.unit}",
            f"{line.usage_record_count} records",
            dollars(line.amount_nanos_usd) + (" (minimum)" if line.minimum_applied else ""),
        )
        for line in invoice.lines
    ]
    title = f"{invoice.name}{' (open)' if invoice.open else ''}"
    table(title, ("line", "quantity", "usage", "amount"), rows)
    console.print(f"total [bold]{dollars(invoice.total_nanos_usd)}[/bold]")


@app.command()
def invoice(
    name: Annotated[str, typer.Argument(help="organizations/.../invoices/2026-11; the running month by default.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show a month's invoice."""

    async def work(mesh: Client) -> None:
        found = await mesh.billing.invoice(name)
        print_json(found) if as_json else show_invoice(found)

    with_client(work, as_json)


@app.command()
def job(name: Annotated[str, typer.Argument(help="projects/.../tuningJobs/ft-...")], as_json: AsJson = False) -> None:
    """Show a job's money: quote, hold, charge, release."""

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
                ("price book", charge.price_book_version),
            ]
        )

    with_client(work, as_json)

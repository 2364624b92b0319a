"""`finemesh billing invoice`, `invoices`, `credit-note`, `profile` and others: documents of money.

It decides no amount.
"""

from __future__ import annotations

import enum
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from finemesh.billing.v1 import credit_note_pb2, invoice_pb2
from finemesh.billing.v1 import invoice_service_pb2 as pb
from finemesh_client.billing import dollars
from finemesh_client.cli.billing.billing_commands import show_invoice, to_nanos
from finemesh_client.cli.output import console, fields, print_json, table, when
from finemesh_client.cli.runtime import AsJson, Limit, with_client
from finemesh_client.client import Client

_MONTH = re.compile(r"\d{4}-\d{2}")

Organization = Annotated[str, typer.Option("--organization", help="organizations/...; your own by default.")]


class Format(enum.StrEnum):
    HTML = "html"
    PDF = "pdf"
    CSV = "csv"
    JSON = "json"


async def invoice_name(mesh: Client, month: str, organization: str = "") -> str:
    """`2026-11`, or a whole name as it is; nothing for the running month."""
    if not month or "/" in month:
        return month
    if not _MONTH.fullmatch(month):
        raise typer.BadParameter(f"{month!r} is no month such as 2026-11, and no name of an invoice")
    return await mesh.invoices.name_of(month, organization)


def invoice(
    month: Annotated[str, typer.Argument(help="2026-11, or a whole name; the running month by default.")] = "",
    format: Annotated[Format | None, typer.Option("--format", help="Write a document instead of showing it.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; - for standard output.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a month's invoice, or write it as a document: html and pdf for people, csv and json for programs.

    A closed invoice is the same bytes each time. Try: finemesh billing invoice 2026-10 --format pdf
    """
    if output is not None and format is None:
        ending = output.suffix.removeprefix(".")
        if ending not in set(Format):
            raise typer.BadParameter("say what to write: --format html, pdf, csv or json", param_hint="--format")
        format = Format(ending)

    async def work(mesh: Client) -> None:
        name = await invoice_name(mesh, month)
        if format is None:
            found = await mesh.billing.invoice(name)
            return print_json(found) if as_json else show_invoice(found)
        document = await mesh.invoices.render(name, pb.InvoiceFormat.Value(f"INVOICE_FORMAT_{format.name}"))
        if str(output) == "-":
            sys.stdout.buffer.write(document.content)
            return None
        path = _write(document, output)
        described = {"file": str(path), "content_type": document.content_type, "size_bytes": len(document.content)}
        return print_json(described) if as_json else console.print(f"written to {path}", soft_wrap=True)

    with_client(work, as_json)


def _write(document: pb.RenderInvoiceResponse, output: Path | None) -> Path:
    """A file of the document's own name is not written over: it may be the closed one."""
    path = output or Path(Path(document.filename).name)
    if output is None and path.exists() and path.read_bytes() != document.content:
        raise typer.BadParameter(f"{path} exists and differs; name the file", param_hint="-o")
    # Under another name until it is whole.
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(document.content)
    partial.replace(path)
    return path


def invoices(limit: Limit = 24, as_json: AsJson = False) -> None:
    """List invoices, newest first; the running month's and those in their time of grace are open."""

    async def work(mesh: Client) -> None:
        found = [each async for each in mesh.invoices.list(limit)]
        if as_json:
            return print_json(found)
        rows = [
            (each.name.rpartition("/")[2], each.number or "open", when(each.close_time), dollars(each.total_nanos_usd))
            for each in found
        ]
        return table("invoices", ("month", "number", "closed", "total"), rows)

    with_client(work, as_json)


def close_invoice(
    month: Annotated[str, typer.Argument(help="2026-11, or organizations/.../invoices/2026-11.")],
    organization: Organization = "",
    as_json: AsJson = False,
) -> None:
    """Close the invoice of a month that is over; closing again shows the same one. Needs the operator role."""

    async def work(mesh: Client) -> None:
        closed = await mesh.invoices.close(await invoice_name(mesh, month, organization))
        if as_json:
            return print_json(closed)
        return fields(
            [
                ("invoice", closed.name),
                ("number", closed.number),
                ("closed", when(closed.close_time)),
                ("total", dollars(closed.total_nanos_usd)),
                ("sha256", closed.sha256),
            ]
        )

    with_client(work, as_json)


def credit_note(
    organization: Annotated[str, typer.Argument(help="organizations/... that gets it.")],
    amount: Annotated[str, typer.Argument(help="Dollars, for example 25 or 25.50.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; it stands on the invoice.")],
    resource: Annotated[str, typer.Option("--resource", help="The job, endpoint or model that it corrects.")] = "",
    invoice: Annotated[str, typer.Option("--invoice", help="The closed invoice that it corrects, by month.")] = "",
    request_id: Annotated[str, typer.Option("--request-id", help="Makes a repeated call count once.")] = "",
    as_json: AsJson = False,
) -> None:
    """Give money back by a new entry; nothing that was booked is changed. Needs the operator role."""
    nanos_usd = to_nanos(amount)

    async def work(mesh: Client) -> None:
        note = await mesh.invoices.give_back(
            organization,
            nanos_usd,
            reason,
            resource=resource,
            invoice=await invoice_name(mesh, invoice, organization),
            request_id=request_id or None,
        )
        print_json(note) if as_json else _show_notes([note])

    with_client(work, as_json)


def credit_notes(limit: Limit = 100, as_json: AsJson = False) -> None:
    """List the organization's credit notes, newest first."""

    async def work(mesh: Client) -> None:
        notes = [note async for note in mesh.invoices.credit_notes(limit)]
        print_json(notes) if as_json else _show_notes(notes)

    with_client(work, as_json)


def _show_notes(notes: list[credit_note_pb2.CreditNote]) -> None:
    rows = [
        (
            note.number,
            when(note.create_time),
            note.billing_month,
            dollars(note.amount_nanos_usd),
            note.reason,
            note.resource or note.invoice,
        )
        for note in notes
    ]
    table("credit notes", ("number", "booked", "invoice of", "amount", "reason", "corrects"), rows)


def profile(
    legal_name: Annotated[str | None, typer.Option("--legal-name", help="Name of who pays.")] = None,
    address: Annotated[list[str] | None, typer.Option("--address", help="A line of the address; repeatable.")] = None,
    tax_id: Annotated[str | None, typer.Option("--tax-id", help="Such as a VAT number; '' for none.")] = None,
    email: Annotated[str | None, typer.Option("--email", help="Where invoices are read; '' for none.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show name and address on open invoices; with options, change those. Changing needs the admin role.

    Try: finemesh billing profile --legal-name "Acme GmbH" --address "Weg 1" --address "10115 Berlin"
    """

    async def work(mesh: Client) -> None:
        found = await mesh.invoices.profile()
        if any(value is not None for value in (legal_name, address, tax_id, email)):
            changed = invoice_pb2.BillingParty(
                legal_name=found.legal_name if legal_name is None else legal_name,
                address_lines=found.address_lines if address is None else address,
                tax_id=found.tax_id if tax_id is None else tax_id,
                email=found.email if email is None else email,
            )
            found = await mesh.invoices.set_profile(changed)
        if as_json:
            return print_json(found)
        lines = [("address" if not index else " ", line) for index, line in enumerate(found.address_lines)]
        return fields(
            [
                ("legal name", found.legal_name or "not set"),
                *lines,
                ("tax id", found.tax_id),
                ("email", found.email),
            ]
        )

    with_client(work, as_json)

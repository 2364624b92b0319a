"""`finemesh billing verify`, `export-journal` and `dead-letters`: the ledger for whoever does not want to believe
it."""

from __future__ import annotations

import enum
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from finemesh.billing.v1 import ledger_service_pb2 as pb
from finemesh_client.accounting.beancount import Beancount
from finemesh_client.accounting.journal import JournalUnreadable, Recomputed, read_lines, recompute, write_line
from finemesh_client.billing import dollars
from finemesh_client.cli.output import as_dict, console, print_json, progress_console, table, when
from finemesh_client.cli.runtime import EXIT_REFUSED, EXIT_USAGE, AsJson, Limit, with_client
from finemesh_client.client import Client

dead_letters = typer.Typer(no_args_is_help=True, help="Events that could not be booked. Needs the operator role.")

Organization = Annotated[
    str, typer.Option("--organization", help="organizations/...; your own by default, others need the operator role.")
]


class Format(enum.StrEnum):
    JSONL = "jsonl"
    BEANCOUNT = "beancount"


def verify(
    organization: Organization = "",
    everything: Annotated[bool, typer.Option("--all", help="All organizations; needs the operator role.")] = False,
    offline: Annotated[
        Path | None,
        typer.Option("--offline", exists=True, dir_okay=False, help="Recompute this exported journal (jsonl) instead."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recompute the ledger and name the first difference; exits 1 when there is one."""
    if offline is not None:
        return _verify_file(offline, as_json)
    if everything and organization:
        raise typer.BadParameter("--all and --organization exclude each other")

    async def work(mesh: Client) -> None:
        last = pb.VerifyLedgerResponse()
        with _progress() as progress:
            shown = progress.add_task("verifying", total=None)
            async for last in mesh.ledger.verify("organizations/-" if everything else organization):
                progress.update(shown, description=f"{last.check}: {_counts(last)}")
        if as_json:
            print_json(as_dict(last))
        elif last.HasField("difference"):
            different = last.difference
            console.print(Text.assemble((different.check, "red"), f": {different.location}"), soft_wrap=True)
            console.print(f"expected {different.expected}", soft_wrap=True)
            console.print(f"found    {different.found}", soft_wrap=True)
        elif last.done:
            console.print(f"ledger ok: {_counts(last)}", soft_wrap=True)
            if last.older_record_count:
                console.print(_older(last), soft_wrap=True)
        if not last.done or last.HasField("difference"):
            raise typer.Exit(EXIT_REFUSED)

    with_client(work, as_json)
    return None


def _verify_file(path: Path, as_json: bool) -> None:
    """Without any server: the code that runs is the one of this client."""
    sums = Recomputed()
    try:
        with path.open(encoding="utf-8") as lines:
            different = recompute(read_lines(lines), sums)
    except (JournalUnreadable, UnicodeDecodeError) as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_USAGE) from None
    if as_json:
        described: dict[str, object] = {
            "organization_id": sums.organization_id,
            "transaction_count": sums.entry_count,
            "hash": sums.head.hex(),
            "balances_nanos_usd": sums.balances,
            "difference": vars(different) if different else None,
        }
        print_json(described)
    elif different is not None:
        console.print(str(different), style="red", soft_wrap=True)
    else:
        balances = ", ".join(f"{account} {dollars(amount)}" for account, amount in sorted(sums.balances.items()))
        console.print(f"ledger ok: {sums.entry_count:,} transactions, head {sums.head.hex()}", soft_wrap=True)
        console.print(balances, soft_wrap=True)
    if different is not None:
        raise typer.Exit(EXIT_REFUSED)


def export_journal(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; - for standard output.")],
    format: Annotated[Format, typer.Option("--format", help="JSON lines, or a file for bean-check.")] = Format.JSONL,
    organization: Organization = "",
    after_position: Annotated[
        int, typer.Option("--after-position", min=0, help="Only entries after this one; for jsonl.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Write every ledger transaction in the order of the chain."""
    if after_position and format is Format.BEANCOUNT:
        raise typer.BadParameter("a beancount file needs the journal from its beginning", param_hint="--after-position")

    async def work(mesh: Client) -> None:
        entries = mesh.ledger.journal(organization, after_position)
        if str(output) == "-":
            count = await _write(entries, format, sys.stdout)
        else:
            # Under another name until it is whole: half a journal must not look like one.
            partial = output.with_name(output.name + ".part")
            with partial.open("w", encoding="utf-8") as file:
                count = await _write(entries, format, file)
            partial.replace(output)
        if as_json and str(output) != "-":
            print_json({"file": str(output), "format": format.value, "transaction_count": count})
        elif str(output) != "-":
            console.print(f"{count:,} transactions written to {output}", soft_wrap=True)

    with_client(work, as_json)


async def _write(entries: AsyncIterator[pb.JournalEntry], format: Format, file: TextIO) -> int:
    count = 0
    book = Beancount("finemesh journal")
    if format is Format.BEANCOUNT:
        file.write(book.begin())
    async for entry in entries:
        file.write(write_line(entry) if format is Format.JSONL else book.entry(entry))
        count += 1
    if format is Format.BEANCOUNT:
        file.write(book.end())
    return count


@dead_letters.command("list")
def list_dead_letters(
    limit: Limit = 100,
    discarded: Annotated[bool, typer.Option("--discarded", help="Those that were given up, by whom and why.")] = False,
    as_json: AsJson = False,
) -> None:
    """List events that could not be booked, oldest first, with their reasons."""

    async def work(mesh: Client) -> None:
        letters = [letter async for letter in mesh.ledger.dead_letters(limit, discarded=discarded)]
        if as_json:
            return print_json(letters)
        if discarded:
            gone = [
                (each.event_id, when(each.discard_time), each.subject, each.discarded_by, each.discard_reason)
                for each in letters
            ]
            return table("discarded dead letters", ("event", "since", "subject", "by", "why"), gone)
        rows = [(each.event_id, when(each.create_time), each.subject, each.reason, each.error) for each in letters]
        return table("dead letters", ("event", "since", "subject", "reason", "error"), rows)

    with_client(work, as_json)


@dead_letters.command()
def replay(
    event_ids: Annotated[list[str] | None, typer.Argument(metavar="[EVENT_ID]...", help="Ids of events.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every dead letter that there is now.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run events again, each in one transaction; exits 1 when one still cannot be booked."""
    if everything == bool(event_ids):
        raise typer.BadParameter("give event ids or --all")

    async def work(mesh: Client) -> None:
        wanted = list(event_ids or ())
        if everything:
            wanted = [letter.event_id async for letter in mesh.ledger.dead_letters()]
        outcomes = [(event_id, await mesh.ledger.replay(event_id)) for event_id in wanted]
        if as_json:
            print_json({event_id: as_dict(outcome) for event_id, outcome in outcomes})
        for event_id, outcome in outcomes if not as_json else ():
            console.print(f"{event_id} {'booked' if outcome.booked else outcome.error}", soft_wrap=True)
        if not all(outcome.booked for _, outcome in outcomes):
            raise typer.Exit(EXIT_REFUSED)

    with_client(work, as_json)


@dead_letters.command()
def discard(
    event_ids: Annotated[list[str], typer.Argument(metavar="EVENT_ID...", help="Ids of events.")],
    reason: Annotated[str, typer.Option("--reason", help="Why nobody will book them; kept for audits.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give events up for good: what they say is never booked, and their jobs' holds end by what is."""
    if as_json and not yes:
        raise typer.BadParameter("--json cannot ask for a confirmation: add --yes")
    if not yes:
        typer.confirm(f"What {len(event_ids)} event(s) say will never be booked. Discard?", abort=True)

    async def work(mesh: Client) -> None:
        for event_id in event_ids:
            await mesh.ledger.discard(event_id, reason)
            if not as_json:
                console.print(f"{event_id} discarded", soft_wrap=True)
        if as_json:
            print_json({"discarded": event_ids})

    with_client(work, as_json)


def _counts(answer: pb.VerifyLedgerResponse) -> str:
    counted = (
        (answer.transaction_count, "transactions"),
        (answer.usage_record_count, "usage records"),
        (answer.hold_count, "holds"),
        (answer.invoice_count, "invoices"),
        (answer.archived_event_count, "archived events"),
    )
    return ", ".join(f"{count:,} {what}" for count, what in counted)


def _older(answer: pb.VerifyLedgerResponse) -> str:
    begin = "is empty" if not answer.HasField("archive_begin_time") else f"begins {when(answer.archive_begin_time)}"
    return f"{answer.older_record_count:,} records are older than the archive of events, which {begin}"


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    return Progress(*columns, console=progress_console, transient=True)

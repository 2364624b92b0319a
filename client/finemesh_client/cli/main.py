"""The `finemesh` command line: every area of the API as a group of commands. It only puts them together."""

from __future__ import annotations

import typer

from finemesh_client.cli import billing, budgets, costs, endpoints, files, invoices, jobs, keys, ledger, models
from finemesh_client.cli.chat import chat
from finemesh_client.cli.demo import demo
from finemesh_client.cli.estimate import estimate
from finemesh_client.cli.keys import whoami
from finemesh_client.cli.up import up

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    help="""A fine-tuning cloud that you run yourself.

    A first run: [bold]finemesh up[/bold] in one terminal, then in another
    [bold]finemesh files upload train.jsonl[/bold],
    [bold]finemesh jobs create -m MODEL -t FILE --watch[/bold] and
    [bold]finemesh chat SLUG/NAME "a question"[/bold].
    Or everything at once: [bold]finemesh demo[/bold].

    The mesh is found by FINEMESH_ADDRESS and FINEMESH_API_KEY, else by the local stack in FINEMESH_DATA_DIR (~/.finemesh).
    Every command takes --json.""",
)
app.command()(up)
app.command()(demo)
app.command()(whoami)
app.add_typer(files.app, name="files")
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.add_typer(endpoints.app, name="endpoints")
app.command()(chat)
billing.app.command()(estimate)
billing.app.command("low-balance")(budgets.low_balance)
billing.app.add_typer(budgets.app, name="budget")
billing.app.command()(invoices.invoice)
billing.app.command()(invoices.invoices)
billing.app.command("close-invoice")(invoices.close_invoice)
billing.app.command("credit-note")(invoices.credit_note)
billing.app.command("credit-notes")(invoices.credit_notes)
billing.app.command()(invoices.profile)
billing.app.command()(costs.costs)
billing.app.command("export-usage")(costs.export_usage)
billing.app.command("verify")(ledger.verify)
billing.app.command("export-journal")(ledger.export_journal)
billing.app.add_typer(ledger.dead_letters, name="dead-letters")
app.add_typer(billing.app, name="billing")
app.add_typer(keys.app, name="keys")

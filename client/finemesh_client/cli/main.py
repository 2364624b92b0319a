"""The `finemesh` command line: every area of the API as a group of commands. It only puts them together."""

from __future__ import annotations

import typer

from finemesh_client.cli import key_commands
from finemesh_client.cli.billing import (
    billing_commands,
    budget_commands,
    cost_commands,
    invoice_commands,
    ledger_commands,
)
from finemesh_client.cli.datasets import file_commands
from finemesh_client.cli.jobs import job_commands
from finemesh_client.cli.jobs.estimate_command import estimate
from finemesh_client.cli.key_commands import whoami
from finemesh_client.cli.local.demo_command import demo
from finemesh_client.cli.local.up_command import up
from finemesh_client.cli.models import endpoint_commands, model_commands
from finemesh_client.cli.models.chat_command import chat

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

    The mesh is found by FINEMESH_ADDRESS and FINEMESH_API_KEY, else by the local stack in FINEMESH_DATA_DIR
    (~/.finemesh). Every command takes --json.""",
)
app.command()(up)
app.command()(demo)
app.command()(whoami)
app.add_typer(file_commands.app, name="files")
app.add_typer(job_commands.app, name="jobs")
app.add_typer(model_commands.app, name="models")
app.add_typer(endpoint_commands.app, name="endpoints")
app.command()(chat)
billing = billing_commands.app
billing.command()(estimate)
billing.command("low-balance")(budget_commands.low_balance)
billing.add_typer(budget_commands.app, name="budget")
billing.command()(invoice_commands.invoice)
billing.command()(invoice_commands.invoices)
billing.command("close-invoice")(invoice_commands.close_invoice)
billing.command("credit-note")(invoice_commands.credit_note)
billing.command("credit-notes")(invoice_commands.credit_notes)
billing.command()(invoice_commands.profile)
billing.command()(cost_commands.costs)
billing.command("export-usage")(cost_commands.export_usage)
billing.command("verify")(ledger_commands.verify)
billing.command("export-journal")(ledger_commands.export_journal)
billing.add_typer(ledger_commands.dead_letters, name="dead-letters")
app.add_typer(billing, name="billing")
app.add_typer(key_commands.app, name="keys")

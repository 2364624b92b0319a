"""`finemesh billing budget` and `low-balance`: what a project or a key may spend in a month, and when to warn."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from finemesh.billing.v1 import budget_service_pb2
from finemesh_client.billing import dollars
from finemesh_client.cli.billing.billing_commands import to_nanos
from finemesh_client.cli.output import console, fields, print_json, table
from finemesh_client.cli.runtime import AsJson, with_client
from finemesh_client.client import Client

app = typer.Typer(no_args_is_help=True, help="Monthly spend caps of your project and its keys.")

Key = Annotated[str, typer.Option("--key", help="Id or name of an API key; the whole project by default.")]


async def known_key(mesh: Client, key: str) -> str:
    """The id of a key of this project; a cap on a key that does not exist would stop nobody."""
    if not key:
        return ""
    key_id = key.rpartition("/")[2]
    async for found in mesh.identity.list_keys(limit=100_000):
        if found.name.rpartition("/")[2] == key_id:
            return key_id
    raise typer.BadParameter(f"this project has no key {key!r}; `finemesh keys list` shows them")


def show(budget: budget_service_pb2.Budget) -> tuple[str | Text, ...]:
    """A budget as a row."""
    spent, cap = budget.spent_nanos_usd, budget.monthly_cap_nanos_usd
    return (
        budget.api_key_id or "the project",
        dollars(cap),
        dollars(spent),
        Text.assemble(f"{spent * 100 // cap}%", (" capped", "red") if budget.capped else ""),
        ", ".join(f"{percent}%" for percent in budget.alert_percents),
    )


COLUMNS = ("whose", "monthly cap", "spent and held", "used", "warns at")


@app.command("set")
def set_budget(
    cap: Annotated[str, typer.Option("--cap", help="Dollars a month, for example 100 or 25.50.")],
    key: Key = "",
    alert: Annotated[
        list[int] | None,
        typer.Option("--alert", min=1, max=100, help="Warn at this share in per cent; repeatable. 50, 80 and 100."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set what may be spent in a month. Needs the admin role."""
    nanos_usd = to_nanos(cap)

    async def work(mesh: Client) -> None:
        key_id = await known_key(mesh, key)
        made = await mesh.budgets.set(nanos_usd, api_key_id=key_id, alert_percents=sorted(set(alert or [])))
        print_json(made) if as_json else table(made.month, COLUMNS, [show(made)])

    with_client(work, as_json)


@app.command("list")
def list_budgets(as_json: AsJson = False) -> None:
    """List the budgets of the project and its keys with what is spent this month."""

    async def work(mesh: Client) -> None:
        budgets = await mesh.budgets.list()
        if as_json:
            return print_json(budgets)
        return table(budgets[0].month if budgets else "no budgets", COLUMNS, [show(budget) for budget in budgets])

    with_client(work, as_json)


@app.command("delete")
def delete_budget(key: Key = "", as_json: AsJson = False) -> None:
    """Remove a budget: nothing stops the spending any more. Needs the admin role."""

    async def work(mesh: Client) -> None:
        project = (await mesh.identity.caller()).project.name
        name = f"{project}/budgets/{key.rpartition('/')[2] or 'project'}"
        await mesh.budgets.delete(name)
        print_json({"deleted": name}) if as_json else console.print(f"removed {name}")

    with_client(work, as_json)


def low_balance(
    amount: Annotated[str, typer.Argument(help="Dollars, for example 10; 0 never warns.")], as_json: AsJson = False
) -> None:
    """Set below which available amount your credit counts as low. Needs the admin role."""
    nanos_usd = 0 if amount == "0" else to_nanos(amount)

    async def work(mesh: Client) -> None:
        stored = await mesh.budgets.set_low_balance(nanos_usd)
        if as_json:
            return print_json({"low_balance_nanos_usd": stored})
        return fields([("low below", dollars(stored) if stored else "never")])

    with_client(work, as_json)

"""`finemesh keys`: API keys of a project. A secret is shown once."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from finemesh.identity.v1 import identity_pb2
from finemesh_client.cli.output import console, fields, print_json, table, when
from finemesh_client.cli.runtime import AsJson, Limit, with_client
from finemesh_client.client import Client

app = typer.Typer(no_args_is_help=True, help="API keys of your project.")
ROLES = {
    "member": identity_pb2.ROLE_MEMBER,
    "admin": identity_pb2.ROLE_ADMIN,
    "operator": identity_pb2.ROLE_OPERATOR,
}


def role_names(key: identity_pb2.ApiKey) -> str:
    """`member, admin`."""
    return ", ".join(identity_pb2.Role.Name(role).removeprefix("ROLE_").lower() for role in key.roles)


@app.command()
def create(
    display_name: Annotated[str, typer.Argument(help="Name to recognise the key by.")],
    role: Annotated[list[str] | None, typer.Option("--role", help="member, admin or operator; repeatable.")] = None,
    project: Annotated[str, typer.Option("--project", help="projects/...; your own by default.")] = "",
    as_json: AsJson = False,
) -> None:
    """Create a key and show its secret, once. Needs the admin role."""
    unknown = [name for name in role or [] if name not in ROLES]
    if unknown:
        raise typer.BadParameter(f"unknown role {unknown[0]!r}; there are {', '.join(ROLES)}")

    async def work(mesh: Client) -> None:
        made = await mesh.identity.create_key(display_name, [ROLES[name] for name in role or []], project=project)
        if as_json:
            return print_json(made)
        console.print(f"{made.key.name} ({role_names(made.key)})")
        return console.print(Text.assemble("secret, shown only now: ", (made.secret, "bold")))

    with_client(work, as_json)


@app.command("list")
def list_keys(limit: Limit = 100, as_json: AsJson = False) -> None:
    """List keys, without secrets."""

    async def work(mesh: Client) -> None:
        keys = [key async for key in mesh.identity.list_keys(limit=limit)]
        if as_json:
            return print_json(keys)
        rows = [
            (k.name, k.display_name, f"{k.secret_prefix}...", role_names(k), when(k.create_time), when(k.revoke_time))
            for k in keys
        ]
        return table("keys", ("name", "display name", "secret", "roles", "created", "revoked"), rows)

    with_client(work, as_json)


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Resource name, projects/.../keys/...")], as_json: AsJson = False
) -> None:
    """Revoke a key: calls with it fail from then on."""

    async def work(mesh: Client) -> None:
        key = await mesh.identity.revoke_key(name)
        print_json(key) if as_json else console.print(f"revoked {key.name}")

    with_client(work, as_json)


def whoami(as_json: AsJson = False) -> None:
    """Say who the calling key is."""

    async def work(mesh: Client) -> None:
        caller = await mesh.identity.caller()
        if as_json:
            return print_json(caller)
        return fields(
            [
                ("organization", f"{caller.organization.name} ({caller.organization.display_name})"),
                ("project", f"{caller.project.name} ({caller.project.slug})"),
                ("key", f"{caller.key.name} ({role_names(caller.key)})"),
            ]
        )

    with_client(work, as_json)

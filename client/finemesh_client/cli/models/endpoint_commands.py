"""`finemesh endpoints`: dedicated endpoints, billed by the started minute while they run."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from finemesh.endpoints.v1 import endpoint_pb2
from finemesh_client.cli.output import console, fields, print_json, state, table, when
from finemesh_client.cli.runtime import AsJson, Limit, with_client
from finemesh_client.client import Client

app = typer.Typer(no_args_is_help=True, help="Dedicated endpoints: own devices, billed by the minute.")
Name = Annotated[str, typer.Argument(help="Resource name, projects/.../endpoints/ep_...")]


def state_of(endpoint: endpoint_pb2.Endpoint) -> Text:
    """The coloured state."""
    return state(endpoint_pb2.EndpointState.Name(endpoint.state), "ENDPOINT_STATE_")


def show(endpoint: endpoint_pb2.Endpoint) -> None:
    """One endpoint for people."""
    fields(
        [
            ("name", endpoint.name),
            ("id", endpoint.endpoint_id),
            ("model", endpoint.model),
            ("state", state_of(endpoint)),
            ("status", endpoint.status_message),
            ("hardware", f"{endpoint.gpu_count} x {endpoint.hardware_type or 'any'}"),
            ("billed minutes", str(endpoint.billed_minutes)),
            ("ready", when(endpoint.ready_time)),
            ("stopped", when(endpoint.stop_time)),
        ]
    )


@app.command()
def create(
    endpoint_name: Annotated[str, typer.Argument(help="Last part of the endpoint's id.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Base or tuned model id.")],
    hardware_type: Annotated[str, typer.Option("--hardware", help="Type of device; any by default.")] = "",
    gpu_count: Annotated[int, typer.Option("--gpus", min=0, help="Devices (default 1).")] = 0,
    as_json: AsJson = False,
) -> None:
    """Create an endpoint and start it."""

    async def work(mesh: Client) -> None:
        endpoint = await mesh.endpoints.create(endpoint_name, model, hardware_type=hardware_type, gpu_count=gpu_count)
        print_json(endpoint) if as_json else show(endpoint)

    with_client(work, as_json)


@app.command("list")
def list_endpoints(limit: Limit = 50, as_json: AsJson = False) -> None:
    """List the project's endpoints, newest first."""

    async def work(mesh: Client) -> None:
        found = [endpoint async for endpoint in mesh.endpoints.list(limit)]
        if as_json:
            return print_json(found)
        rows = [(e.name, e.endpoint_id, e.model, state_of(e), str(e.billed_minutes)) for e in found]
        return table("endpoints", ("name", "id", "model", "state", "billed minutes"), rows)

    with_client(work, as_json)


@app.command()
def get(name: Name, as_json: AsJson = False) -> None:
    """Show one endpoint."""

    async def work(mesh: Client) -> None:
        endpoint = await mesh.endpoints.get(name)
        print_json(endpoint) if as_json else show(endpoint)

    with_client(work, as_json)


@app.command()
def start(name: Name, as_json: AsJson = False) -> None:
    """Start a stopped endpoint."""

    async def work(mesh: Client) -> None:
        endpoint = await mesh.endpoints.start(name)
        print_json(endpoint) if as_json else show(endpoint)

    with_client(work, as_json)


@app.command()
def stop(name: Name, as_json: AsJson = False) -> None:
    """Stop an endpoint; running requests finish first."""

    async def work(mesh: Client) -> None:
        endpoint = await mesh.endpoints.stop(name)
        print_json(endpoint) if as_json else show(endpoint)

    with_client(work, as_json)


@app.command()
def delete(name: Name, as_json: AsJson = False) -> None:
    """Delete a stopped endpoint."""

    async def work(mesh: Client) -> None:
        await mesh.endpoints.delete(name)
        print_json({"deleted": name}) if as_json else console.print(f"deleted {name}")

    with_client(work, as_json)

"""`finemesh jobs`: quote, create, follow, cancel and download what a job made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finemesh.tuning.v1 import tuning_job_pb2
from finemesh_client.billing import dollars
from finemesh_client.cli.jobs.job_create import create
from finemesh_client.cli.jobs.job_follow import watch_job
from finemesh_client.cli.jobs.job_show import STATE_PREFIX, exit_unless_succeeded, show_job
from finemesh_client.cli.models.model_commands import download_model
from finemesh_client.cli.output import print_json, size, state, table, when
from finemesh_client.cli.runtime import AsJson, Limit, with_client
from finemesh_client.client import Client

app = typer.Typer(no_args_is_help=True, help="Tuning jobs, from a quote to a model.")
Name = Annotated[str, typer.Argument(help="Resource name, projects/.../tuningJobs/ft-...")]
app.command()(create)


@app.command("list")
def list_jobs(limit: Limit = 50, as_json: AsJson = False) -> None:
    """List the project's jobs, newest first."""

    async def work(mesh: Client) -> None:
        jobs = [job async for job in mesh.jobs.list(limit)]
        if as_json:
            return print_json(jobs)
        rows = [
            (
                job.name,
                state(tuning_job_pb2.TuningJobState.Name(job.state), STATE_PREFIX),
                job.output_model,
                f"{job.progress.step}/{job.progress.step_count}" if job.progress.step_count else "",
                dollars(job.quoted_nanos_usd) if job.quoted_nanos_usd else "",
                when(job.create_time),
            )
            for job in jobs
        ]
        return table("jobs", ("name", "state", "output model", "step", "price", "created"), rows)

    with_client(work, as_json)


@app.command()
def get(name: Name, as_json: AsJson = False) -> None:
    """Show one job: state, progress, why it waits or why it failed."""

    async def work(mesh: Client) -> None:
        job = await mesh.jobs.get(name)
        print_json(job) if as_json else show_job(job)

    with_client(work, as_json)


@app.command()
def watch(name: Name, as_json: AsJson = False) -> None:
    """Follow a job with a live bar, loss and ETA until it ends; with --json one document per update."""
    ended: list[int] = []

    async def work(mesh: Client) -> None:
        if as_json:
            async for message in mesh.jobs.watch(name):
                print_json(message)
                ended[:] = [message.tuning_job.state]
            return
        job = await watch_job(mesh, name)
        ended.append(job.state)
        show_job(job)

    with_client(work, as_json)
    exit_unless_succeeded(ended)


@app.command()
def cancel(name: Name, as_json: AsJson = False) -> None:
    """Ask for a cancellation. Finished steps are paid, the rest of the hold is released."""

    async def work(mesh: Client) -> None:
        job = await mesh.jobs.cancel(name)
        print_json(job) if as_json else show_job(job)

    with_client(work, as_json)


@app.command()
def events(name: Name, limit: Limit = 200, as_json: AsJson = False) -> None:
    """Show a job's history, oldest first."""

    async def work(mesh: Client) -> None:
        found = [event async for event in mesh.jobs.events(name, limit)]
        if as_json:
            return print_json(found)
        rows = [(str(event.sequence), when(event.event_time), event.message) for event in found]
        return table("events", ("#", "time", "event"), rows)

    with_client(work, as_json)


@app.command()
def checkpoints(name: Name, limit: Limit = 50, as_json: AsJson = False) -> None:
    """List a job's committed checkpoints, oldest first."""

    async def work(mesh: Client) -> None:
        found = [checkpoint async for checkpoint in mesh.jobs.checkpoints(name, limit)]
        if as_json:
            return print_json(found)
        rows = [
            (
                str(c.step),
                "yes" if c.asked else "until a newer one",
                str(c.attempt),
                size(c.size_bytes),
                c.manifest_sha256[:16],
                when(c.create_time),
            )
            for c in found
        ]
        return table("checkpoints", ("step", "kept", "attempt", "size", "manifest", "committed"), rows)

    with_client(work, as_json)


@app.command()
def download(
    name: Name, folder: Annotated[Path, typer.Argument(help="Folder to write.")], as_json: AsJson = False
) -> None:
    """Download the weights that a job made."""

    async def work(mesh: Client) -> None:
        job = await mesh.jobs.get(name)
        await download_model(mesh, job.output_model, folder, as_json)

    with_client(work, as_json)

"""`finemesh jobs`: quote, create, follow, cancel and download what a job made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2
from finemesh_client.billing import dollars
from finemesh_client.cli.job_spec import SCHEDULES, TRAIN_ON_INPUTS, JobOptions, to_spec
from finemesh_client.cli.job_watch import watch_job
from finemesh_client.cli.models import download_model
from finemesh_client.cli.output import console, fields, print_json, progress_console, size, state, table, when
from finemesh_client.cli.runtime import EXIT_REFUSED, AsJson, Limit, with_client
from finemesh_client.client import Client

app = typer.Typer(no_args_is_help=True, help="Tuning jobs, from a quote to a model.")
Name = Annotated[str, typer.Argument(help="Resource name, projects/.../tuningJobs/ft-...")]
STATE_PREFIX = "TUNING_JOB_STATE_"


def one_of(choices: Sequence[str]) -> object:
    """A callback that refuses words outside a list and names the list."""

    def check(value: str) -> str:
        if value not in choices:
            raise typer.BadParameter(f"must be one of {', '.join(choices)}")
        return value

    return check


def show_quote(quote: tuning_service_pb2.QuoteTuningJobResponse) -> None:
    """A quote for people."""
    counts = quote.counts
    held_out = f"; {counts.validation_examples:,} held out ({counts.validation_tokens:,} tokens)"
    console.print(
        f"{counts.training_examples:,} examples, {counts.training_tokens:,} tokens per epoch"
        + (held_out if counts.validation_examples else "")
        + (f"; {counts.truncated_examples:,} cut to the limit" if counts.truncated_examples else "")
    )
    rows = [
        (
            term.description,
            f"{term.quantity:,}",
            f"{dollars(term.nanos_usd_per_million)} / M" if term.nanos_usd_per_million else "",
            dollars(term.amount_nanos_usd),
        )
        for term in quote.terms
    ]
    table(f"quote (price book {quote.price_book_version})", ("term", "quantity", "price", "amount"), rows)
    console.print(
        f"total [bold]{dollars(quote.total_nanos_usd)}[/bold], available {dollars(quote.available_nanos_usd)}"
    )


def show_job(job: tuning_job_pb2.TuningJob) -> None:
    """A job for people."""
    p = job.progress
    fields(
        [
            ("name", job.name),
            ("state", state(tuning_job_pb2.TuningJobState.Name(job.state), STATE_PREFIX)),
            ("base model", job.spec.base_model),
            ("output model", job.output_model),
            ("revision", job.output_revision),
            ("waits for", job.queue.waiting_for),
            ("progress", f"step {p.step} of {p.step_count}, loss {p.training_loss:.4f}" if p.step else ""),
            ("held-out loss", f"{p.validation_loss:.4f}" if p.HasField("validation_loss") else ""),
            ("quoted and held", dollars(job.quoted_nanos_usd) if job.quoted_nanos_usd else ""),
            ("attempts", str(job.attempt_count or "")),
            ("created", when(job.create_time)),
            ("started", when(job.start_time)),
            ("ended", when(job.end_time)),
            ("error", f"[red]{job.error.reason}[/red] {job.error.message}" if job.error.reason else ""),
        ]
    )


@app.command()
def create(
    model: Annotated[str, typer.Option("--model", "-m", help="Base model id; see `finemesh models list`.")],
    training_file: Annotated[str, typer.Option("--training-file", "-t", help="File name from `files upload`.")],
    validation_file: Annotated[str, typer.Option("--validation-file", help="Held-out file.")] = "",
    name: Annotated[str, typer.Option("--name", help="Last part of the new model's id.")] = "",
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of a LoRA adapter.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="LoRA rank, 1 to 256 (default 16).")] = None,
    alpha: Annotated[int | None, typer.Option("--alpha", help="LoRA alpha (default twice the rank).")] = None,
    dropout: Annotated[float | None, typer.Option("--dropout", help="LoRA dropout (default 0).")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the data (default 1).")] = None,
    evaluations: Annotated[int | None, typer.Option("--evaluations", help="Evaluations per epoch.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Sequences per step, each of packed examples (default 8).")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Peak (default 1e-4).")] = None,
    schedule: Annotated[
        str, typer.Option("--schedule", callback=one_of(tuple(SCHEDULES)), help="cosine or linear.")
    ] = "cosine",
    warmup_ratio: Annotated[float | None, typer.Option("--warmup-ratio", help="Share of steps, 0 to 1.")] = None,
    train_on_inputs: Annotated[
        str, typer.Option("--train-on-inputs", callback=one_of(tuple(TRAIN_ON_INPUTS)), help="auto, true or false.")
    ] = "auto",
    sequence_tokens_max: Annotated[int | None, typer.Option("--max-tokens", help="Longest example.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed (default 42).")] = None,
    checkpoint_steps: Annotated[int | None, typer.Option("--checkpoint-steps", help="Steps between.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="GPUs as one gang (default 1).")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for a confirmation.")] = False,
    quote_only: Annotated[bool, typer.Option("--quote", help="Show the exact price and stop.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the job until it ends.")] = False,
    request_id: Annotated[str, typer.Option("--request-id", help="Makes a repeated call return the same job.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show the exact price, ask, and create a job."""
    options = JobOptions(
        model=model,
        training_file=training_file,
        validation_file=validation_file,
        output_name=name,
        full=full,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        epochs=epochs,
        evaluations=evaluations,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_ratio=warmup_ratio,
        train_on_inputs=train_on_inputs,
        sequence_tokens_max=sequence_tokens_max,
        seed=seed,
        checkpoint_interval_steps=checkpoint_steps,
        gpus=gpus,
    )
    if as_json and not (yes or quote_only):
        raise typer.BadParameter("--json cannot ask for a confirmation: add --yes, or --quote for the price only")
    ended: list[int] = []

    async def work(mesh: Client) -> None:
        spec = to_spec(options)
        if quote_only or not yes:
            with progress_console.status("counting tokens for the quote"):
                quote = await mesh.jobs.quote(spec)
            if quote_only and as_json:
                return print_json(quote)
            show_quote(quote)
            if quote_only:
                return None
            typer.confirm(f"Hold {dollars(quote.total_nanos_usd)} and start?", abort=True)
        job = await mesh.jobs.create(spec, request_id=request_id or None)
        if watch:
            progress_console.print(job.name)
            job = await watch_job(mesh, job.name)
            ended.append(job.state)
        return print_json(job) if as_json else show_job(job)

    with_client(work, as_json)
    exit_unless_succeeded(ended)


def exit_unless_succeeded(ended: list[int]) -> None:
    """Exit code 1 for a job that was followed to another end than success."""
    if ended and ended != [tuning_job_pb2.TUNING_JOB_STATE_SUCCEEDED]:
        raise typer.Exit(EXIT_REFUSED)


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
            (str(c.step), str(c.attempt), size(c.size_bytes), c.manifest_sha256[:16], when(c.create_time))
            for c in found
        ]
        return table("checkpoints", ("step", "attempt", "size", "manifest", "committed"), rows)

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

"""`finemesh jobs create`: the exact price, a question, and the job.

It fills no defaults.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from finemesh_client.billing import dollars
from finemesh_client.cli.given_secrets import SecretFiles, secrets_of
from finemesh_client.cli.jobs.job_follow import watch_job
from finemesh_client.cli.jobs.job_options import JobOptions
from finemesh_client.cli.jobs.job_show import exit_unless_succeeded, show_job, show_quote
from finemesh_client.cli.jobs.job_spec import to_spec
from finemesh_client.cli.output import print_json, progress_console
from finemesh_client.cli.runtime import AsJson, OptionConflict, options_from, with_client
from finemesh_client.client import Client


@options_from(JobOptions)
def create(
    options: JobOptions,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for a confirmation.")] = False,
    quote_only: Annotated[bool, typer.Option("--quote", help="Show the exact price and stop.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the job until it ends.")] = False,
    request_id: Annotated[str, typer.Option("--request-id", help="Makes a repeated call return the same job.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show the exact price, ask, and create a job. Numbers in brackets are the server's defaults."""
    if as_json and not (yes or quote_only):
        raise typer.BadParameter("--json cannot ask for a confirmation: add --yes, or --quote for the price only")
    try:
        spec = to_spec(options)
        files = SecretFiles(wandb_key_file=options.wandb_key_file, hf_token_file=options.hf_token_file)
        secrets = None if quote_only else secrets_of(spec, files, os.environ)
    except OptionConflict as conflict:
        raise typer.BadParameter(str(conflict)) from None
    ended: list[int] = []

    async def work(mesh: Client) -> None:
        if quote_only or not yes:
            with progress_console.status("counting tokens for the quote"):
                quote = await mesh.jobs.quote(spec)
            if quote_only and as_json:
                return print_json(quote)
            show_quote(quote)
            if quote_only:
                return None
            typer.confirm(f"Hold {dollars(quote.total_nanos_usd)} and start?", abort=True)
        job = await mesh.jobs.create(spec, request_id=request_id or None, secrets=secrets)
        if watch:
            progress_console.print(job.name)
            job = await watch_job(mesh, job.name)
            ended.append(job.state)
        return print_json(job) if as_json else show_job(job)

    with_client(work, as_json)
    exit_unless_succeeded(ended)

"""`finemesh files`: upload, list, inspect, download and delete datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.text import Text

from finemesh.files.v1 import file_pb2, file_service_pb2
from finemesh_client.cli.datasets.preview_command import features_of, preview
from finemesh_client.cli.output import console, fields, print_json, progress_console, size, state, table, when
from finemesh_client.cli.runtime import EXIT_REFUSED, AsJson, Limit, with_client
from finemesh_client.client import Client

app = typer.Typer(no_args_is_help=True, help="Datasets: JSONL, or token ids as Parquet.")
app.command()(preview)
Name = Annotated[str, typer.Argument(help="Resource name, projects/.../files/...")]


def byte_bar() -> Progress:
    """A progress bar for bytes, on stderr so that stdout stays clean."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=progress_console, transient=True)


def show(file: file_pb2.File) -> None:
    """One file for people, with its errors."""
    fields(
        [
            ("name", file.name),
            ("display name", file.display_name),
            ("state", state(file_pb2.FileState.Name(file.state), "FILE_STATE_")),
            ("format", file_pb2.DatasetFormat.Name(file.format).removeprefix("DATASET_FORMAT_").lower()),
            ("uses", features_of(file.features)),
            ("examples", f"{file.line_count:,}"),
            ("size", size(file.size_bytes)),
            ("sha256", file.sha256),
            ("created", when(file.create_time)),
        ]
    )
    report = file.validation
    if report.error_count:
        shown = len(report.errors)
        count = (f"{report.error_count:,} errors", "red")
        console.print(Text.assemble(count, f", the first {shown}:" if shown else ""))
        for error in report.errors:
            found = f", found {error.found}" if error.found else ""
            console.print(f"  line {error.line} {error.path}: expected {error.expectation}{found}")


def show_storage(storage: file_service_pb2.Storage) -> None:
    """What is stored, of what may be."""
    fields(
        [
            ("stored", f"{size(storage.size_bytes)} of {size(storage.size_bytes_max)}"),
            ("files", f"{storage.file_count:,} of {storage.file_count_max:,}"),
        ]
    )


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="A JSONL or Parquet file.")],
    as_json: AsJson = False,
) -> None:
    """Upload a dataset; every line is checked and all errors are shown at once. Exits with 1 when it is invalid."""
    states: list[int] = []

    async def work(mesh: Client) -> None:
        with byte_bar() as bar:
            task = bar.add_task(f"uploading {path.name}", total=path.stat().st_size)
            file = await mesh.files.upload(path, on_bytes=lambda count: bar.advance(task, count))
        states.append(file.state)
        print_json(file) if as_json else show(file)

    with_client(work, as_json)
    if states != [file_pb2.FILE_STATE_READY]:
        raise typer.Exit(EXIT_REFUSED)


@app.command("list")
def list_files(limit: Limit = 50, as_json: AsJson = False) -> None:
    """List the project's files, newest first."""

    async def work(mesh: Client) -> None:
        files = [file async for file in mesh.files.list(limit)]
        if as_json:
            return print_json(files)
        rows = [
            (
                f.name,
                f.display_name,
                state(file_pb2.FileState.Name(f.state), "FILE_STATE_"),
                f"{f.line_count:,}",
                size(f.size_bytes),
                when(f.create_time),
            )
            for f in files
        ]
        return table("files", ("name", "display name", "state", "examples", "size", "created"), rows)

    with_client(work, as_json)


@app.command()
def get(name: Name, as_json: AsJson = False) -> None:
    """Show one file with its validation report."""

    async def work(mesh: Client) -> None:
        file = await mesh.files.get(name)
        print_json(file) if as_json else show(file)

    with_client(work, as_json)


@app.command()
def download(
    name: Name, target: Annotated[Path, typer.Argument(help="File to write.")], as_json: AsJson = False
) -> None:
    """Download a file's bytes; the digest is checked before the target appears."""

    async def work(mesh: Client) -> None:
        written = await mesh.files.download(name, target)
        if as_json:
            print_json({"path": str(target), "size_bytes": written})
        else:
            console.print(f"{target}: {size(written)}")

    with_client(work, as_json)


@app.command()
def delete(name: Name, as_json: AsJson = False) -> None:
    """Delete a file."""

    async def work(mesh: Client) -> None:
        await mesh.files.delete(name)
        print_json({"deleted": name}) if as_json else console.print(f"deleted {name}")

    with_client(work, as_json)


@app.command()
def usage(as_json: AsJson = False) -> None:
    """Show how much the project stores, and how much it may."""

    async def work(mesh: Client) -> None:
        storage = await mesh.files.storage()
        print_json(storage) if as_json else show_storage(storage)

    with_client(work, as_json)


@app.command()
def quota(
    project: Annotated[str, typer.Argument(help="projects/...")],
    size_bytes: Annotated[int | None, typer.Option("--bytes", min=0, help="Most stored bytes.")] = None,
    files: Annotated[int | None, typer.Option("--files", min=0, help="Most files.")] = None,
    as_json: AsJson = False,
) -> None:
    """Set how much a project may store; what is not given is what the platform says. Needs the operator role."""

    async def work(mesh: Client) -> None:
        storage = await mesh.files.set_quota(project, size_bytes_max=size_bytes, file_count_max=files)
        print_json(storage) if as_json else show_storage(storage)

    with_client(work, as_json)

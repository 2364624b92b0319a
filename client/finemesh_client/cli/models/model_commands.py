"""`finemesh models`: the base catalogue, tuned models, import and download."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from finemesh.models.v1 import model_pb2
from finemesh_client import hub_download
from finemesh_client.cli.datasets.file_commands import byte_bar
from finemesh_client.cli.given_secrets import HUB_VARIABLE, secret
from finemesh_client.cli.models.import_adapter_command import import_adapter
from finemesh_client.cli.models.limits_command import limits
from finemesh_client.cli.output import console, fields, print_json, progress_console, size, table, when
from finemesh_client.cli.runtime import AsJson, Limit, OptionConflict, with_client
from finemesh_client.client import Client
from finemesh_client.models import importable_files

app = typer.Typer(no_args_is_help=True, help="Base models and tuned models.")
Name = Annotated[str, typer.Argument(help="Model id `slug/name`, or projects/.../models/...")]
app.command()(limits)
app.command("import-adapter")(import_adapter)


async def download_model(mesh: Client, name: str, folder: Path, as_json: bool) -> None:
    """Downloads every file of a model with a bar and says what was written."""
    model = await mesh.models.get(name)
    with byte_bar() as bar:
        task = bar.add_task(f"downloading {model.model_id}", total=sum(f.size_bytes for f in model.files))
        paths = await mesh.models.download(model.name, folder, on_bytes=lambda count: bar.advance(task, count))
    if as_json:
        print_json({"model": model.model_id, "revision": model.revision, "paths": [str(path) for path in paths]})
    else:
        console.print(f"{model.model_id} {model.revision}: {len(paths)} files in {folder}")


@app.command("list")
def list_models(limit: Limit = 100, as_json: AsJson = False) -> None:
    """List base models and the project's tuned models."""

    async def work(mesh: Client) -> None:
        bases = [base async for base in mesh.models.list_base(limit)]
        tuned = [model async for model in mesh.models.list(limit)]
        if as_json:
            return print_json([*bases, *tuned])
        base_rows = [
            (b.model_id, b.architecture, f"{b.parameter_count:,}", str(b.context_tokens_max), b.revision) for b in bases
        ]
        table("base models", ("id", "architecture", "weights", "context", "revision"), base_rows)
        rows = [
            (
                m.model_id,
                model_pb2.ModelKind.Name(m.kind).removeprefix("MODEL_KIND_").lower(),
                m.base_model,
                m.revision,
                when(m.create_time),
            )
            for m in tuned
        ]
        return table("tuned models", ("id", "kind", "base", "revision", "created"), rows)

    with_client(work, as_json)


@app.command()
def get(name: Name, as_json: AsJson = False) -> None:
    """Show a tuned model: files, lineage, parity report."""

    async def work(mesh: Client) -> None:
        model = await mesh.models.get(name)
        if as_json:
            return print_json(model)
        fields(
            [
                ("name", model.name),
                ("id", model.model_id),
                ("base", f"{model.base_model} {model.base_revision}"),
                ("revision", model.revision),
                ("job", model.tuning_job),
                ("created", when(model.create_time)),
                *sorted(model.lineage.items()),
            ]
        )
        return table("files", ("path", "size", "sha256"), [(f.path, size(f.size_bytes), f.sha256) for f in model.files])

    with_client(work, as_json)


@app.command("import")
def import_model(
    source: Annotated[str, typer.Argument(help="A local folder with safetensors, or a hub id such as org/name.")],
    model_id: Annotated[str, typer.Option("--as", help="Id in the catalogue; the hub id by default.")] = "",
    revision: Annotated[str, typer.Option("--revision", help="Commit, tag or branch of the hub (main).")] = "",
    hf_token_file: Annotated[
        Path | None, typer.Option("--hf-token-file", help="File with a token for the hub, instead of HF_TOKEN.")
    ] = None,
    tool_parser: Annotated[
        str,
        typer.Option("--tool-parser", help="vLLM's parser of calls of tools, or none; else the template says."),
    ] = "",
    reasoning_parser: Annotated[
        str,
        typer.Option("--reasoning-parser", help="vLLM's parser of thoughts, or none; else the template says."),
    ] = "",
    chat_template: Annotated[
        Path | None,
        typer.Option(
            "--chat-template",
            exists=True,
            dir_okay=False,
            readable=True,
            help="A Jinja file: it wins over the model's own template in training, serving and exports.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add a base model to the catalogue: safetensors and tokenizer files only. Needs the operator role; a hub id a
    network. The template of --chat-template is checked as the model's own would be."""
    given = _text_of(chat_template)
    local = Path(source)
    is_local = local.is_dir()
    if is_local and not model_id:
        raise typer.BadParameter("a local folder needs an id for the catalogue: --as org/name")
    if is_local and (revision or hf_token_file):
        raise typer.BadParameter("--revision and --hf-token-file belong to the hub, not to a local folder")
    try:
        token = secret(hf_token_file, os.environ.get(HUB_VARIABLE, ""))
    except OptionConflict as conflict:
        raise typer.BadParameter(str(conflict)) from None

    async def work(mesh: Client) -> None:
        if is_local:
            found = hub_download.HubFolder(folder=local, files=tuple(importable_files(local)), commit="")
        else:
            with progress_console.status(Text(f"downloading {source} from the hub")):
                found = await asyncio.to_thread(hub_download.fetch, source, revision, token)
            progress_console.print(f"{source} at commit {found.commit}")
        total = sum(path.stat().st_size for path in found.files)
        with byte_bar() as bar:
            task = bar.add_task(f"importing {model_id or source}", total=total)
            base = await mesh.models.import_base(
                model_id or source,
                found.folder,
                files=found.files,
                source=f"hf:{source}@{found.commit}" if found.commit else "",
                tool_parser=tool_parser,
                reasoning_parser=reasoning_parser,
                chat_template=given,
                on_bytes=lambda count: bar.advance(task, count),
            )
        if as_json:
            print_json(base)
        else:
            console.print(f"{base.model_id} {base.revision}: {base.parameter_count:,} weights, {size(base.size_bytes)}")

    with_client(work, as_json)


def _text_of(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{path} is no text in UTF-8") from None
    if not text.strip():
        raise typer.BadParameter(f"{path} is empty; without --chat-template the model keeps its own template")
    return text


@app.command()
def download(
    name: Name, folder: Annotated[Path, typer.Argument(help="Folder to write.")], as_json: AsJson = False
) -> None:
    """Download the weights of a tuned model; every digest is checked."""

    async def work(mesh: Client) -> None:
        await download_model(mesh, name, folder, as_json)

    with_client(work, as_json)


@app.command()
def delete(name: Name, as_json: AsJson = False) -> None:
    """Remove a tuned model."""

    async def work(mesh: Client) -> None:
        model = await mesh.models.get(name)
        await mesh.models.delete(model.name)
        print_json({"deleted": model.name}) if as_json else console.print(f"deleted {model.model_id}")

    with_client(work, as_json)

"""`finemesh models import-adapter`: an adapter that was trained elsewhere, as a model of the project."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from finemesh_client import hub_download
from finemesh_client.cli.datasets.file_commands import byte_bar
from finemesh_client.cli.given_secrets import HUB_VARIABLE, secret
from finemesh_client.cli.output import console, print_json, progress_console
from finemesh_client.cli.runtime import AsJson, OptionConflict, with_client
from finemesh_client.client import Client
from finemesh_client.models import adapter_files


def import_adapter(
    source: Annotated[
        str,
        typer.Argument(
            help="A local folder with adapter_config.json and adapter_model.safetensors, or a hub id such as org/name."
        ),
    ],
    base: Annotated[
        str, typer.Option("--base", help="Id of the base model that it was trained on; `models list` shows them.")
    ],
    output_name: Annotated[
        str, typer.Option("--as", help="Its name in the project: calls use `slug/NAME`. The last part of a hub id.")
    ] = "",
    revision: Annotated[str, typer.Option("--revision", help="Commit, tag or branch of the hub (main).")] = "",
    hf_token_file: Annotated[
        Path | None, typer.Option("--hf-token-file", help="File with a token for the hub, instead of HF_TOKEN.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve a LoRA adapter that was trained elsewhere: it becomes a model of the project.

    peft writes the folder: `model.save_pretrained(FOLDER)`. rsLoRA, rank and alpha patterns are served as peft means
    them, and the tokens that end an answer are taken from a generation_config.json beside it. PiSSA, DoRA, aLoRA and
    others are refused with what to do. It is then listed, chatted with, billed, downloaded and deleted like a tuned
    model. An import that was cut can be sent again.
    """
    local = Path(source)
    is_local = local.is_dir()
    if is_local and (revision or hf_token_file):
        raise typer.BadParameter("--revision and --hf-token-file belong to the hub, not to a local folder")
    if not output_name and is_local:
        raise typer.BadParameter("a local folder needs a name for the model: --as NAME")
    name = output_name or source.rpartition("/")[2].lower()
    try:
        token = secret(hf_token_file, os.environ.get(HUB_VARIABLE, ""))
    except OptionConflict as conflict:
        raise typer.BadParameter(str(conflict)) from None

    async def work(mesh: Client) -> None:
        if is_local:
            found = hub_download.HubFolder(folder=local, files=tuple(adapter_files(local)), commit="")
        else:
            with progress_console.status(Text(f"downloading {source} from the hub")):
                found = await asyncio.to_thread(
                    hub_download.fetch, source, revision, token, choose=hub_download.chosen_of_adapter
                )
            progress_console.print(f"{source} at commit {found.commit}")
        total = sum(path.stat().st_size for path in found.files)
        with byte_bar() as bar:
            task = bar.add_task(f"importing {name}", total=total)
            model = await mesh.models.import_adapter(
                name,
                base,
                found.folder,
                files=found.files,
                source=f"hf:{source}@{found.commit}" if found.commit else "",
                on_bytes=lambda count: bar.advance(task, count),
            )
        if as_json:
            print_json(model)
        else:
            console.print(f"{model.model_id} {model.revision}: rank {model.adapter_rank} on {model.base_model}")
            console.print(f'finemesh chat {model.model_id} "a question"')

    with_client(work, as_json)

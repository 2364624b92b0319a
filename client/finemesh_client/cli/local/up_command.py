"""`finemesh up`: the whole mesh on this machine, as processes.

The launcher is a program of its own; this only calls it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from finemesh_client.config import default_data_dir

LAUNCHER = "deploy.local"


def launcher_command(*arguments: str) -> list[str]:
    """The command line that runs the launcher with this interpreter."""
    return [sys.executable, "-m", LAUNCHER, *arguments]


def up(
    data_dir: Annotated[
        Path | None, typer.Option("--data", help="Data folder (default: FINEMESH_DATA_DIR or ~/.finemesh).")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="vllm, or stub for a mesh without a model.")] = "vllm",
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=16, help="Number of trainer nodes.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="Keep the services' logs in files only.")] = False,
) -> None:
    """Start PostgreSQL, nats-server and the five services on this machine; Ctrl-C stops them.

    Prints the addresses and, on the first start, an API key (add credit with `finemesh billing top-up`). Needs no
    Docker and no GPU. A second stack with another --data folder runs beside the first.
    """
    arguments = ["up", "--data", str(data_dir or default_data_dir()), "--engine", engine, "--nodes", str(nodes)]
    if quiet:
        arguments.append("--quiet")
    # The launcher takes this process's place, so that Ctrl-C and SIGTERM reach it and nothing stands between.
    os.execv(sys.executable, launcher_command(*arguments))  # noqa: S606

"""What really happened, told by whoever did it: a line of JSON for each step of a child and each token of an engine.

It stands beside the mesh and believes nothing that the mesh says. One write makes a line, so a killed process leaves no
half of one that matters.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = "witness"


def folder_above(path: Path) -> Path:
    """The witness's folder of the mesh that works in `path`."""
    return next(parent / FOLDER for parent in path.absolute().parents if (parent / FOLDER).is_dir())


class Witness:
    """Appends to a file of its own; `folder` is `FOLDER` in the data folder of a mesh."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._file = os.open(folder / f"{kind}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def tell(self, **fields: Any) -> None:
        os.write(self._file, json.dumps(fields).encode() + b"\n")


def told(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Every line that was told of a kind, in the order of the writes."""
    path = folder / f"{kind}.jsonl"
    if path.exists():
        for line in path.read_bytes().splitlines():
            yield json.loads(line)


def take(folder: Path, device: str) -> bool:
    """Takes a device for the life of this process, as the hardware would; False when another process has it."""
    lock = os.open(folder / f"device-{device}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    # Kept open on purpose: the kernel gives the lock back when the process is gone, however it ends.
    return True

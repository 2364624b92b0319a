"""Looks through what processes write, while they run and delete."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def files_left(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every regular file below a folder with its bytes; what is deleted before it is read is not left."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent) / name for name in names):
            with suppress(FileNotFoundError):
                if path.is_file():
                    yield path, path.read_bytes()

"""Takes a model file by file to local disk: names and sizes bounded, digests checked, no code. Not pure: disk.

It refuses to know tables, streams and what the files mean.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from chassis.errors import DataLoss, ResourceExhausted
from formats.manifests import FileDigest
from services.inference.models.domain import model_invalid

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Everything else could carry code, or is not needed to load a model.
TAKEN_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})


class ModelSpool:
    """The files of one import on local disk."""

    def __init__(self, folder: Path, *, bytes_max: int, files_max: int, setting: str = "model_bytes_max") -> None:
        """`setting` names the limit of bytes for whoever meets it."""
        self.folder = folder
        self.files: list[FileDigest] = []
        self._bytes_max = bytes_max
        self._files_max = files_max
        self._setting = setting
        self._bytes = 0
        self._open: BinaryIO | None = None
        self._current: FileDigest | None = None
        self._digest = hashlib.sha256()
        self._written = 0

    async def begin(self, path: str, size_bytes: int, sha256: str) -> None:
        """A new file begins; the one before must be whole."""
        await self.end_file()
        if not FILE_NAME.fullmatch(path):
            raise model_invalid("file.path", f"{path[:80]!r} is no plain file name", "INVALID_FIELD")
        if Path(path).suffix not in TAKEN_SUFFIXES:
            raise model_invalid(
                "file.path", f"{path} is not one of {', '.join(sorted(TAKEN_SUFFIXES))}; code is never taken"
            )
        if any(file.path == path for file in self.files):
            raise model_invalid("file.path", f"{path} comes twice", "INVALID_FIELD")
        if len(self.files) == self._files_max:
            raise ResourceExhausted("SIZE_LIMIT", f"it has at most {self._files_max} files")
        self._bytes += max(size_bytes, 0)
        if size_bytes < 0 or self._bytes > self._bytes_max:
            raise ResourceExhausted("SIZE_LIMIT", f"its files have at most {self._bytes_max} bytes ({self._setting})")
        self._current = FileDigest(path=path, size_bytes=size_bytes, sha256=sha256)
        self._digest, self._written = hashlib.sha256(), 0
        self._open = await asyncio.to_thread((self.folder / path).open, "xb")

    async def write(self, chunk: bytes) -> None:
        """The next bytes of the current file."""
        if self._open is None or self._current is None:
            raise model_invalid("chunk", "comes before its file", "INVALID_FIELD")
        self._written += len(chunk)
        if self._written > self._current.size_bytes:
            raise DataLoss("DIGEST_MISMATCH", f"{self._current.path} has more bytes than announced")
        self._digest.update(chunk)
        await asyncio.to_thread(self._open.write, chunk)

    async def end_file(self) -> None:
        """The current file, if any, must be what was announced."""
        if self._open is None or self._current is None:
            return
        await asyncio.to_thread(self._open.close)
        self._open, file = None, self._current
        if self._written != file.size_bytes:
            raise DataLoss(
                "DIGEST_MISMATCH", f"{file.path} has {self._written} bytes, announced were {file.size_bytes}"
            )
        if self._digest.hexdigest() != file.sha256:
            raise DataLoss("DIGEST_MISMATCH", f"{file.path} does not match its SHA-256")
        self.files.append(file)

    async def put_in_place(self, name: str, content: bytes, *, of: Sequence[str]) -> None:
        """A file that was not sent, in place of the one of that name and of others; after all files came."""
        for path in (name, *of):
            await asyncio.to_thread((self.folder / path).unlink, missing_ok=True)
        await asyncio.to_thread((self.folder / name).write_bytes, content)
        self.files = [file for file in self.files if file.path not in (name, *of)]
        digest = hashlib.sha256(content).hexdigest()
        self.files.append(FileDigest(path=name, size_bytes=len(content), sha256=digest))

    async def close(self) -> None:
        """Closes a file that was left open by a broken stream."""
        if self._open is not None:
            await asyncio.to_thread(self._open.close)

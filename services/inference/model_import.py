"""Takes a base model file by file: names and sizes bounded, digests checked, no code, then its config understood.

It spools to a local folder and refuses to know tables and streams.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from chassis.errors import DataLoss, FieldViolation, InvalidArgument, ResourceExhausted
from services.inference.domain import StoredFile

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Everything else could carry code, or is not needed to load a model.
TAKEN_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})
NEEDED_FILES = ("config.json", "tokenizer.json")
CONFIG_BYTES_MAX = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the files say of the model."""

    architecture: str
    parameter_count: int
    context_tokens_max: int


def _refuse(field: str, problem: str, reason: str = "MODEL_INVALID") -> InvalidArgument:
    return InvalidArgument(reason, f"{field}: {problem}", violations=[FieldViolation(field, problem)])


class ModelSpool:
    """The files of one import on local disk."""

    def __init__(self, folder: Path, *, bytes_max: int, files_max: int) -> None:
        self.folder = folder
        self.files: list[StoredFile] = []
        self._bytes_max = bytes_max
        self._files_max = files_max
        self._bytes = 0
        self._open: BinaryIO | None = None
        self._current: StoredFile | None = None
        self._digest = hashlib.sha256()
        self._written = 0

    async def begin(self, path: str, size_bytes: int, sha256: str) -> None:
        """A new file begins; the one before must be whole."""
        await self.end_file()
        if not FILE_NAME.fullmatch(path):
            raise _refuse("file.path", f"{path[:80]!r} is no plain file name", "INVALID_FIELD")
        if Path(path).suffix not in TAKEN_SUFFIXES:
            raise _refuse("file.path", f"{path} is not one of {', '.join(sorted(TAKEN_SUFFIXES))}; code is never taken")
        if any(file.path == path for file in self.files):
            raise _refuse("file.path", f"{path} comes twice", "INVALID_FIELD")
        if len(self.files) == self._files_max:
            raise ResourceExhausted("SIZE_LIMIT", f"a model has at most {self._files_max} files (model_files_max)")
        self._bytes += max(size_bytes, 0)
        if size_bytes < 0 or self._bytes > self._bytes_max:
            raise ResourceExhausted("SIZE_LIMIT", f"a model has at most {self._bytes_max} bytes (model_bytes_max)")
        self._current = StoredFile(path=path, size_bytes=size_bytes, sha256=sha256)
        self._digest, self._written = hashlib.sha256(), 0
        self._open = await asyncio.to_thread((self.folder / path).open, "xb")

    async def write(self, chunk: bytes) -> None:
        """The next bytes of the current file."""
        if self._open is None or self._current is None:
            raise _refuse("chunk", "comes before its file", "INVALID_FIELD")
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

    async def close(self) -> None:
        """Closes a file that was left open by a broken stream."""
        if self._open is not None:
            await asyncio.to_thread(self._open.close)


def understand(folder: Path, files: list[StoredFile]) -> ModelFacts:
    """What the files say of the model; InvalidArgument MODEL_INVALID names the file that is missing or wrong."""
    names = {file.path for file in files}
    for needed in NEEDED_FILES:
        if needed not in names:
            raise _refuse(needed, "is missing")
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if not weights:
        raise _refuse("*.safetensors", "is missing; other weight formats can carry code and are not taken")
    config = _config(folder / "config.json")
    return ModelFacts(
        architecture=_architecture(config),
        parameter_count=sum(_parameters(folder / name) for name in weights),
        context_tokens_max=_context(config),
    )


def _config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > CONFIG_BYTES_MAX:
        raise _refuse(path.name, f"has more than {CONFIG_BYTES_MAX} bytes")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise _refuse(path.name, "is not JSON") from None
    if not isinstance(config, dict):
        raise _refuse(path.name, "is not a JSON object")
    if "auto_map" in config:
        raise _refuse("config.json", "names code of its own (auto_map), which is never run")
    return config


def _architecture(config: dict[str, Any]) -> str:
    found = config.get("architectures")
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise _refuse("config.json", "names no architecture")
    return found[0][:128]


def _context(config: dict[str, Any]) -> int:
    declared = config.get("max_position_embeddings")
    if not isinstance(declared, int) or isinstance(declared, bool) or not 2 <= declared < 1 << 31:
        raise _refuse("config.json", "declares no max_position_embeddings")
    return declared


def _parameters(path: Path) -> int:
    """Number of weights in a file, from its header alone."""
    count = 0
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                count += size
    except (SafetensorError, OSError) as error:
        raise _refuse(path.name, f"is no safetensors file: {error}") from None
    if count == 0:
        raise _refuse(path.name, "holds no weights")
    return count

"""The cache of prepared files: a folder of columns for each of them. Not pure: disk.

A folder holds tokens and sequences and is named by a digest of all that decides them. Attempts of a job, the processes
of a run and the analysis of the same file on the same machine prepare it once. A folder is there whole or not at all
(disk/durable.py). Its digests are checked before anything is taken from it, and what is damaged is made anew. The
columns are mapped, not read, so they may be larger than memory. A folder that is removed stays until its last reader
ends.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formats.manifests import MANIFEST
from formats.prompts.model_folder import ModelFolder
from formats.row_errors import RowErrors
from formats.rows import Features
from services.trainer.train.data.packing.pack import Groups
from services.trainer.train.data.packing.sequences import SEQUENCES_VERSION, Sequences, make_sequences, sequences_of
from services.trainer.train.data.preparation.fingerprint import preparation_version
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.data.tokens.tokenized_file import TokenizedFile
from services.trainer.train.disk.durable import (
    UNFINISHED_PREFIX,
    commit_folder,
    read_whole_folder,
    remove_folder,
)

CACHE_VERSION = 1
# Keys share locks: more of them would only be more files.
LOCKS = 64
_COUNTS = (
    "rows_per_example", "rows", "truncated_rows", "skipped_rows", "longest_row_tokens", "truncated_line",
    "skipped_line",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PreparedFile:
    """A file of dataset rows, tokenised and packed. `rows_digest` is the digest of the rows."""

    file: TokenizedFile
    packed: Sequences
    rows_digest: str


def prepared_file(file: TokenizedFile, max_seq_length: int) -> PreparedFile:
    rows_digest = file.rows.digest()
    packed = make_sequences(file.rows, packing=True, max_seq_length=max_seq_length, rows_digest=rows_digest)
    return PreparedFile(file=file, packed=packed, rows_digest=rows_digest)


def cache_key(file_sha256: str, folder: ModelFolder, settings: PrepareSettings) -> str:
    """Digest of all that decides tokens and sequences: the file, tokenizer and template, the settings, and the code
    that applies them."""
    decisive = {
        "cache_version": CACHE_VERSION,
        "sequences_version": SEQUENCES_VERSION,
        "code": preparation_version(),
        "file_sha256": file_sha256,
        "tokenizer_sha256": folder.tokenizer_sha256,
        "template_sha256": folder.template_sha256,
        "special_tokens": folder.special_tokens,
        "eos_id": folder.eos_id,
        "vocabulary_size": folder.vocabulary_size,
        "max_seq_length": settings.max_seq_length,
        "train_on_inputs": settings.train_on_inputs,
        "template_date": settings.template_date,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


class TokenCache:
    """`load` and `keep` a key while it is `locked`. Without room or rights on the disk there is no cache, and nothing
    fails."""

    def __init__(self, folder: Path, size_bytes_max: int) -> None:
        self._folder = folder
        self._size_bytes_max = size_bytes_max

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """One process at a time; the lock ends with its holder, however that ends."""
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):
                held.enter_context(self._lock(key, fcntl.LOCK_EX))
            yield

    def load(self, key: str) -> PreparedFile | None:
        folder = self._folder / key
        try:
            manifest = read_whole_folder(folder)
            prepared = _read(folder, manifest)
            os.utime(folder)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError):
            # Torn or damaged: the caller makes it anew.
            with contextlib.suppress(OSError):
                remove_folder(folder)
            return None
        return prepared

    def keep(self, key: str, prepared: PreparedFile) -> None:
        with contextlib.suppress(OSError):
            commit_folder(self._folder / key, lambda folder: _write(folder, prepared), _manifest(prepared))
            self._make_room(key)

    def _make_room(self, newest: str) -> None:
        """Removes what a killed writer left, and the least recently used folders above the limit."""
        found = []
        for path in self._folder.iterdir():
            if path.name.startswith(UNFINISHED_PREFIX):
                self._remove(path, path.name.removeprefix(UNFINISHED_PREFIX).removeprefix("removed-"))
            elif (path / MANIFEST).is_file():
                size_bytes = sum(file.stat().st_size for file in path.iterdir())
                found.append((path.stat().st_mtime, size_bytes, path))
        excess_bytes = sum(size for _, size, _ in found) - self._size_bytes_max
        for _, size_bytes, path in sorted(found):
            if excess_bytes <= 0:
                return
            if path.name != newest:
                self._remove(path, path.name)
                excess_bytes -= size_bytes

    def _remove(self, path: Path, key: str) -> None:
        """Removes a folder unless another process works on it."""
        with contextlib.suppress(OSError), self._lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB):
            remove_folder(path)

    @contextlib.contextmanager
    def _lock(self, key: str, how: int) -> Iterator[None]:
        locks = self._folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / f"{int(key[:8], 16) % LOCKS:02d}").open("ab") as file:
            fcntl.flock(file, how)
            yield


def _write(folder: Path, prepared: PreparedFile) -> None:
    rows, packed = prepared.file.rows, prepared.packed
    columns: dict[str, NDArray[Any]] = {
        "ids": rows.ids,
        "labelled": rows.labelled,
        "offsets": rows.offsets,
        "packed_rows": packed.groups.rows,
        "packed_offsets": packed.groups.offsets,
    }
    if rows.weights is not None:
        columns["weights"] = rows.weights
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column, allow_pickle=False)


def _manifest(prepared: PreparedFile) -> dict[str, Any]:
    file = prepared.file
    return {
        "format": file.format,
        "sha256": file.sha256,
        "features": asdict(file.features),
        "rows_per_second": file.rows_per_second,
        "counts": {name: getattr(file.rows, name) for name in _COUNTS},
        "weighted": file.rows.weights is not None,
        "rows_digest": prepared.rows_digest,
        "packed_digest": prepared.packed.digest,
    }


def _read(folder: Path, manifest: dict[str, Any]) -> PreparedFile:
    def column(name: str) -> NDArray[Any]:
        mapped: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return mapped

    rows = TokenRows(
        ids=column("ids"),
        labelled=column("labelled"),
        offsets=column("offsets"),
        weights=column("weights") if manifest["weighted"] else None,
        **{name: manifest["counts"][name] for name in _COUNTS},
    )
    groups = Groups(column("packed_rows"), column("packed_offsets"))
    file = TokenizedFile(
        format=manifest["format"],
        sha256=manifest["sha256"],
        features=Features(**manifest["features"]),
        errors=RowErrors(),
        rows=rows,
        rows_per_second=manifest["rows_per_second"],
    )
    return PreparedFile(
        file=file, packed=sequences_of(groups, rows, manifest["packed_digest"]), rows_digest=manifest["rows_digest"]
    )

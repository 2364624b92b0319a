"""Arrays of growing length, collected in bounded memory. Not pure: disk.

What is too much for memory lies in a file without a name and is mapped back. The bytes are the same in memory and on
disk. It knows no rows and no tokens.
"""

import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from services.trainer.train.disk.durable import DiskFull, is_disk_full

# Up to this many bytes of an array stay in memory; the disk gets pieces of this size.
MEMORY_BYTES_MAX = 32 * 1024**2


class SpilledArray:
    """`append` pieces in order, then take the `whole` once. `folder` None is the system's folder for temporary files.
    Raises DiskFull where there is no room."""

    def __init__(self, dtype: Any, folder: Path | None) -> None:
        self._dtype = np.dtype(dtype)
        self._folder = folder
        self._pieces: list[NDArray[Any]] = []
        self._pieces_bytes = 0
        self._file: IO[bytes] | None = None

    def append(self, piece: NDArray[Any]) -> None:
        self._pieces.append(piece)
        self._pieces_bytes += piece.nbytes
        if self._pieces_bytes > MEMORY_BYTES_MAX:
            self._spill()

    def whole(self) -> NDArray[Any]:
        if self._file is None:
            return self._joined()
        self._spill()
        # The mapping keeps the file alive; it is gone with the last reference, also after a kill.
        return np.memmap(self._file, dtype=self._dtype, mode="r")

    def _spill(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives as long as its mapping
            self._file.write(self._joined().data)
            self._file.flush()
        except OSError as error:
            if is_disk_full(error):
                raise DiskFull("the scratch file of the tokens") from error
            raise
        self._pieces, self._pieces_bytes = [], 0

    def _joined(self) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, self._dtype), *self._pieces], dtype=self._dtype)

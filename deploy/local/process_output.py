"""What the processes say: every line to the process's own file, and to the terminal behind a coloured name."""

import asyncio
import select
import zlib
from contextlib import suppress
from io import FileIO, UnsupportedOperation
from pathlib import Path
from typing import TextIO

FILE_BYTES_MAX = 32 * 1024 * 1024
LINE_BYTES_MAX = 64 * 1024
# In UTF-8 no more than the 4 KiB that a pipe has room for when it says that it has some.
SHOWN_CHARS_MAX = 1000
_COLOURS = (36, 32, 33, 35, 34, 96, 92, 93, 95, 94)
_NAME_WIDTH = 12


class Output:
    """Where the lines of one process go. The file is turned over once at `FILE_BYTES_MAX`, so it stays bounded.

    A line that cannot be written is dropped and counted: a process whose lines nobody takes would block in its pipe.
    """

    def __init__(self, name: str, folder: Path, terminal: TextIO | None) -> None:
        self.path = folder / f"{name}.log"
        self._terminal = terminal
        colour = _COLOURS[zlib.crc32(name.encode()) % len(_COLOURS)]
        coloured = terminal is not None and terminal.isatty()
        padded = f"{name:<{_NAME_WIDTH}}"
        self._prefix = f"\x1b[{colour}m{padded}\x1b[0m | " if coloured else f"{padded} | "
        self._file: FileIO | None = None
        self._dropped = 0
        self._is_torn = False

    async def copy(self, reader: asyncio.StreamReader) -> None:
        """Copies until the process and everything that inherited its output have closed it."""
        rest = b""
        while chunk := await reader.read(LINE_BYTES_MAX):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > LINE_BYTES_MAX:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self.write(line)
        if rest:
            self.write(rest)

    def write(self, line: bytes) -> None:
        self._append(line)
        if self._terminal is not None:
            show(self._prefix + line.decode(errors="replace"), self._terminal)

    def tail(self, lines: int = 20) -> str:
        """The last lines of the file, for a person who has to find out why the process ended."""
        if not self.path.exists():
            return ""
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - LINE_BYTES_MAX))
            said = file.read().decode(errors="replace").splitlines()
        return "\n".join(said[-lines:])

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _append(self, line: bytes) -> None:
        lost = f"[{self._dropped} lines were dropped here: they could not be written]\n" if self._dropped else ""
        text = b"\n" * self._is_torn + lost.encode() + line + b"\n"
        written = 0
        try:
            written = self._open().write(text) or 0
        except OSError:
            self.close()
        if written < len(text):
            self._dropped += 1
            self._is_torn = self._is_torn or written > 0
        else:
            self._dropped, self._is_torn = 0, False

    def _open(self) -> FileIO:
        if self._file is not None and self._file.tell() > FILE_BYTES_MAX:
            self.close()
            self.path.replace(self.path.with_suffix(".log.1"))
        if self._file is None:
            # Without a buffer, which would keep what the disk refused and refuse to be closed.
            self._file = FileIO(self.path, "ab")
        return self._file


def show(text: str, terminal: TextIO) -> None:
    """Prints a line, cut to what always fits, or drops it: a terminal that is stopped or closed, or a pipe that nobody
    reads, would hold up the launcher and with it every process that it listens to."""
    with suppress(OSError, ValueError):
        if _takes_a_line(terminal):
            print(text[:SHOWN_CHARS_MAX], file=terminal, flush=True)


def _takes_a_line(terminal: TextIO) -> bool:
    try:
        number = terminal.fileno()
    except UnsupportedOperation:
        return True
    room = select.poll()
    room.register(number, select.POLLOUT)
    return bool(room.poll(0))

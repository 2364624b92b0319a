"""Picks free local ports for a stack, once, so that every process can be told its peers' addresses before they run.

A picked port stays claimed while its stack lives, bound or not: seconds pass before a service binds it, and the next
stack picks from the same range.
"""

import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

HOST = "127.0.0.1"
# Below the range from which the kernel lends ports to outgoing connections: a port that is kept for restarts must not
# be lent while its owner is down. From 29,400 on the processes of jobs over several nodes meet.
PORT_MIN = 20_000
PORT_MAX = 29_400
ATTEMPTS_MAX = 2_000


class PortClaims:
    """Ports that are this stack's until `release` or the end of the process; other stacks of this user pass them by."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(tempfile.gettempdir()) / f"finemesh-ports-{os.getuid()}"
        self._locks: dict[int, int] = {}

    def pick(self, names: Sequence[str], kept: Mapping[str, int]) -> dict[str, int]:
        """A free port per name; the one from `kept` when nobody took it since."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        ports = {name: kept[name] for name in names if name in kept and self._claim(kept[name])}
        source = random.Random()  # noqa: S311 - two stacks that start together should rarely meet; nothing is secret
        for name in names:
            if name not in ports:
                ports[name] = self._claim_any(source, name)
        return ports

    def release(self) -> None:
        for lock in self._locks.values():
            os.close(lock)
        self._locks.clear()

    def _claim_any(self, source: random.Random, name: str) -> int:
        for _ in range(ATTEMPTS_MAX):
            port = source.randrange(PORT_MIN, PORT_MAX)
            if self._claim(port):
                return port
        raise OSError(f"no free port between {PORT_MIN} and {PORT_MAX} for {name}")

    def _claim(self, port: int) -> bool:
        if port in self._locks:
            return False
        lock = os.open(self._folder / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        if not is_free(port):
            os.close(lock)
            return False
        self._locks[port] = lock
        return True


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections of an earlier owner that still linger do not make the port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True

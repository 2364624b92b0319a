"""The data folder of a stack: where things lie in it, its lock, secrets and ports. It starts nothing."""

import fcntl
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.local.ports import PortClaims


class StackRunning(Exception):
    """Another launcher holds this data folder."""


class DataFolder:
    """Paths below one root. The root belongs to at most one running stack, which the lock says."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self._lock: int | None = None
        self._claims = PortClaims()

    @property
    def postgres(self) -> Path:
        return self.root / "postgres"

    @property
    def nats(self) -> Path:
        return self.root / "nats"

    @property
    def tls(self) -> Path:
        return self.root / "tls"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def state_file(self) -> Path:
        return self.root / "stack.json"

    @property
    def api_key_file(self) -> Path:
        return self.root / "api_key.json"

    @property
    def ports_file(self) -> Path:
        return self.root / "ports.json"

    def acquire(self) -> None:
        """Takes the lock for the life of this process; StackRunning when another one has it."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.logs, self.artifacts, self.cache, self.nats):
            folder.mkdir(mode=0o700, exist_ok=True)
            # One that an earlier start made, or a service.
            folder.chmod(0o700)
        lock = os.open(self.root / "stack.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise StackRunning(f"a stack runs on {self.root} already (process {holder}); stop it first") from None
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        self._lock = lock

    def release(self) -> None:
        """Gives the lock back, and with it the word that a stack runs here. Nothing happens without the lock."""
        if self._lock is not None:
            self.state_file.unlink(missing_ok=True)
            self._claims.release()
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def holder(self) -> int | None:
        """The process that runs a stack here, None when nobody does."""
        try:
            lock = os.open(self.root / "stack.lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(os.read(lock, 32) or 0) or None
        finally:
            os.close(lock)
        return None

    def secrets(self, names: Sequence[str]) -> dict[str, str]:
        """A random secret per name, made once and readable by this user only."""
        path = self.root / "secrets.json"
        known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        missing = [name for name in names if name not in known]
        if missing:
            known.update({name: secrets.token_hex(24) for name in missing})
            write_private(path, known)
        return known

    def ports(self, names: Sequence[str]) -> dict[str, int]:
        """A free port per name until `release`, the same ones as the last time where they are still free."""
        kept = json.loads(self.ports_file.read_text()) if self.ports_file.exists() else {}
        ports = self._claims.pick(names, kept)
        write_private(self.ports_file, {**kept, **ports})
        return ports


def write_private(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON that only this user can read; a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)

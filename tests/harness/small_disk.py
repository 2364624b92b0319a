"""A file system of a few megabytes that a test can fill and free. It knows nothing of what is written there.

Root mounts it. Others, who may not, have it mounted by a process in a user namespace of its own, and reach it through
that process's root.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZE_BYTES = 64 * 1024**2
BLOCK = b"\0" * 4096


class SmallDisk:
    """`folder` is its root, which every user may pass through."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filling = folder / "filling"

    def fill(self) -> None:
        """Takes what is left, to the last block."""
        with self._filling.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(BLOCK * 256)
            except OSError:
                pass
            try:
                while True:
                    file.write(BLOCK)
            except OSError:
                return

    def free(self) -> None:
        self._filling.unlink()


@contextmanager
def small_disk(size_bytes: int = SIZE_BYTES) -> Iterator[SmallDisk]:
    with tempfile.TemporaryDirectory(prefix="finemesh-disk-", ignore_cleanup_errors=True) as place:
        point = Path(place)
        point.chmod(0o711)
        mount = ("mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=755", "tmpfs", place)
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            try:
                yield SmallDisk(point)
            finally:
                subprocess.run(["umount", "--lazy", place], check=True)
            return
        keep = f"{' '.join(mount)} && echo mounted && exec sleep infinity"
        keeper = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", keep], stdout=subprocess.PIPE, text=True
        )
        try:
            assert keeper.stdout is not None
            if keeper.stdout.readline() != "mounted\n":
                pytest.skip("neither mount nor unshare may mount a file system here")
            yield SmallDisk(Path(f"/proc/{keeper.pid}/root{place}"))
        finally:
            keeper.kill()
            keeper.wait()

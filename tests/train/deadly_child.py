"""The training child with a fault built in, for tests: `python -m tests.train.deadly_child ...` takes the child's
arguments.

FINEMESH_TEST_DIE_AT: the process kills itself when it syncs a file whose path holds this text, after it has cut that
file in half, as a power failure leaves one. FINEMESH_TEST_FULL_AT: from the moment a folder whose path holds this text
is begun, no file may grow beyond a few bytes, as on a full disk; the refusal comes from the kernel.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.trainer.train import main
from services.trainer.train.disk import durable

_FULL_BYTES = 1000


def die_while_syncing(part: str) -> None:
    whole = durable._sync

    def sync(path: Path) -> None:
        if part in str(path):
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        whole(path)

    durable._sync = sync


def fill_the_disk(part: str) -> None:
    whole = durable._fill

    def fill(unfinished: Path, write: Callable[[Path], None], manifest: Any) -> Any:
        if part in str(unfinished):
            resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL_BYTES, _FULL_BYTES))
        return whole(unfinished, write, manifest)

    durable._fill = fill


if __name__ == "__main__":
    if os.environ.get("FINEMESH_TEST_DIE_AT"):
        die_while_syncing(os.environ["FINEMESH_TEST_DIE_AT"])
    if os.environ.get("FINEMESH_TEST_FULL_AT"):
        fill_the_disk(os.environ["FINEMESH_TEST_FULL_AT"])
    code = main.main()
    sys.stderr.flush()
    os._exit(code)

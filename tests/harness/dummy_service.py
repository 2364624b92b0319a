"""A service that only lives: a mesh server with health on the address it is told.
The launcher's tests run it as all five.

A file named after it in the data folder makes it fail at the start.
"""

import os
import re
import sys
from pathlib import Path

from chassis.process import Process, run
from chassis.rpc.server import ServerBuilder
from chassis.settings import ChassisSettings


def own_name() -> str:
    """The launcher gives each process only its own LISTEN_ADDRESS."""
    names = [match[1] for key in os.environ if (match := re.fullmatch(r"FINEMESH_([A-Z]+)_LISTEN_ADDRESS", key))]
    assert len(names) == 1
    return names[0].lower()


async def main(process: Process) -> None:
    await ServerBuilder(process, process.settings).start()


if __name__ == "__main__":
    name = own_name()
    if (Path(os.environ["FINEMESH_DATA_DIR"]) / f"broken-{name}").exists():
        sys.exit(f"{name} is told to fail")
    sys.exit(run(main, ChassisSettings(service_name=name)))

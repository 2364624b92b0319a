"""The containers' health check: `python -m deploy.healthcheck billing` asks this container's own server over mTLS.

It shows the service's own certificate, so that a container needs no second key. It knows no service's API.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from chassis import pki
from chassis.bus import STREAMS_HEALTH
from deploy.local.health import wait_serving

TIMEOUT_S = 7.0
PART_TIMEOUT_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.healthcheck", description=__doc__)
    parser.add_argument("service")
    service = parser.parse_args(arguments).service
    try:
        asyncio.run(asyncio.wait_for(check(service, os.environ), TIMEOUT_S))
    except TimeoutError:
        print(f"{service} does not say SERVING")
        return 1
    try:
        asyncio.run(asyncio.wait_for(check(service, os.environ, STREAMS_HEALTH), PART_TIMEOUT_S))
    except TimeoutError:
        # Not a failure of this container: a restart would not cure it.
        print(f"warning: a stream that {service} publishes to fills up; a reader of it is away or too slow")
    return 0


async def check(service: str, environment: Mapping[str, str], component: str = "") -> None:
    """Returns once the server, or this part of it, says SERVING."""
    port = environment[f"FINEMESH_{service.upper()}_LISTEN_ADDRESS"].rpartition(":")[2]
    credentials = pki.load(Path(environment["FINEMESH_TLS_DIR"]), service)
    await wait_serving(credentials, f"127.0.0.1:{port}", service, component)


if __name__ == "__main__":
    sys.exit(main())

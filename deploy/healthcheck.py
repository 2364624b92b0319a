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
from chassis.bus import PUBLISHING_HEALTH, STREAMS_HEALTH
from chassis.bus.durables import ARCHIVE_HEALTH
from deploy.local.health import wait_serving

TIMEOUT_S = 7.0
PART_TIMEOUT_S = 1.0
# Parts of a service that health can be asked for, and what it means when one is not well.
PARTS = {
    STREAMS_HEALTH: "a stream that the service publishes to fills up; a reader of it is away or too slow",
    PUBLISHING_HEALTH: "the bus takes no events; once its disk has room, restart nats",
    ARCHIVE_HEALTH: "events wait for the archive; the object store is away or too slow",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.healthcheck", description=__doc__)
    parser.add_argument("service")
    service = parser.parse_args(arguments).service
    try:
        asyncio.run(asyncio.wait_for(check(service, os.environ), TIMEOUT_S))
    except TimeoutError:
        print(f"{service} does not say SERVING")
        return 1
    # Not failures of this container: a restart would cure none of them.
    for problem in asyncio.run(_problems(service, os.environ)):
        print(f"warning: {problem}")
    return 0


async def _problems(service: str, environment: Mapping[str, str]) -> list[str]:
    """Of the parts that do not say SERVING; a part that the service does not have is well."""
    checks = [asyncio.wait_for(check(service, environment, part), PART_TIMEOUT_S) for part in PARTS]
    answers = await asyncio.gather(*checks, return_exceptions=True)
    problems = []
    for part, answer in zip(PARTS, answers, strict=True):
        if isinstance(answer, TimeoutError):
            problems.append(PARTS[part])
        elif answer is not None:
            raise answer
    return problems


async def check(service: str, environment: Mapping[str, str], component: str = "") -> None:
    """Returns once the server, or this part of it, says SERVING."""
    port = environment[f"FINEMESH_{service.upper()}_LISTEN_ADDRESS"].rpartition(":")[2]
    credentials = pki.load(Path(environment["FINEMESH_TLS_DIR"]), service)
    await wait_serving(credentials, f"127.0.0.1:{port}", service, component)


if __name__ == "__main__":
    sys.exit(main())

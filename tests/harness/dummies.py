"""The table with every service replaced by one that only lives, and the launcher's command line over it."""

import sys
from dataclasses import replace

from deploy.local.__main__ import main
from deploy.local.table import SERVICES

DUMMIES = tuple(
    replace(
        service,
        module="tests.harness.dummy_service",
        bootstrap=service.bootstrap and "tests.harness.dummy_bootstrap",
    )
    for service in SERVICES
)

if __name__ == "__main__":
    sys.exit(main(services=DUMMIES))

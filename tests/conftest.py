"""Makes the harness's fixtures known to every test, and shares the tests among processes where a run has several."""

import os
from typing import Any

# Read by OpenMP when torch is loaded, which tests of several folders do: spinning threads crawl when other processes
# want the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

from tests.harness.fixtures import database_url, make_settings, nats_server, postgres, tls_dir
from tests.harness.turns import FileTurns, longest_first

__all__ = ["database_url", "make_settings", "nats_server", "postgres", "tls_dir"]


def pytest_configure() -> None:
    """A process that pytest-xdist starts is told the size of a terminal that it does not have: readline, which pytest
    loads, puts it into the environment."""
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileTurns:
    return FileTurns(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)

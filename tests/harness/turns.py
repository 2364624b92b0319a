"""How the processes of one run of pytest share the tests: each takes whole files, whose fixtures start servers, and the
files that stand on one mesh together. It knows no test.
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# The files that stand on the mesh of tests/faults/conftest.py. One that is missing here starts a second one.
ON_ONE_MESH = frozenset(
    f"tests/faults/test_{name}.py" for name in ("cancellations", "events_twice", "frozen_node", "kills")
)
# What takes longest for its number of tests comes first, so that no process is left alone with it at the end.
FIRST = ("tests/faults/", "tests/mesh/", "tests/storm/", "tests/train/", "tests/unit/train/")


class FileTurns(LoadScopeScheduling):
    """Hands out files in the order in which they are collected."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        return "tests/faults" if file in ON_ONE_MESH else file


def longest_first(items: list[pytest.Item]) -> None:
    """Puts the tests in the order of FIRST; within a folder nothing moves."""

    def place(item: pytest.Item) -> int:
        return next((number for number, folder in enumerate(FIRST) if item.nodeid.startswith(folder)), len(FIRST))

    items.sort(key=place)

"""How the processes of one run of pytest share the tests: each takes whole files, whose fixtures start servers,
and whole folders that share one mesh. It knows no test.
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# The tests of such a folder stand on one mesh of the package.
TOGETHER = ("tests/faults/",)
# What takes longest for its number of tests comes first, so that no process is left alone with it at the end.
FIRST = ("tests/faults/", "tests/mesh/", "tests/storm/", "tests/train/", "tests/unit/train/")


class FileTurns(LoadScopeScheduling):
    """Hands out files and folders in the order in which they are collected."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        return next((folder for folder in TOGETHER if file.startswith(folder)), file)


def longest_first(items: list[pytest.Item]) -> None:
    """Puts the tests in the order of FIRST; within a folder nothing moves."""

    def place(item: pytest.Item) -> int:
        return next((number for number, folder in enumerate(FIRST) if item.nodeid.startswith(folder)), len(FIRST))

    items.sort(key=place)

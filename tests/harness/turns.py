"""How the processes of one run of pytest share the tests: each takes whole files, whose fixtures start servers, and the
files that share a mesh or an engine together. It knows no test.
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Files whose tests share a mesh or an engine that takes long to start. One that is missing here starts its own.
SHARING = {
    "tests/faults/": ("cancellations", "events_twice", "frozen_node", "kills"),
    "tests/contract/engines/": ("engine_contract", "vllm_numbers"),
}
TURNS = {f"{folder}test_{name}.py": folder for folder, names in SHARING.items() for name in names}
# What takes longest for its number of tests comes first, so that no process is left alone with it at the end.
FIRST = ("tests/faults/", "tests/mesh/", "tests/storm/", "tests/train/", "tests/contract/engines/", "tests/unit/train/")


class FileTurns(LoadScopeScheduling):
    """Hands out files in the order in which they are collected."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        return TURNS.get(file, file)


def longest_first(items: list[pytest.Item]) -> None:
    """Puts the tests in the order of FIRST; within a folder nothing moves."""

    def place(item: pytest.Item) -> int:
        return next((number for number, folder in enumerate(FIRST) if item.nodeid.startswith(folder)), len(FIRST))

    items.sort(key=place)

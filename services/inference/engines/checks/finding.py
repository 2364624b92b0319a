"""What is wrong with a file of a model, in words for whoever imports it."""

from __future__ import annotations

from collections.abc import Collection

_NAMED_MAX = 5


class Finding(Exception):
    """The first thing that is wrong, and the file that has it."""

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(f"{file}: {problem}")
        self.file = file
        self.problem = problem


def listed(names: Collection[str]) -> str:
    """The first names in order, and how many more there are."""
    shown = sorted(names)[:_NAMED_MAX]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")

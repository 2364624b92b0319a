"""Packs rows into sequences of a maximum length by best fit decreasing. Deterministic; it knows lengths, not tokens.

Memory: five arrays of eight bytes a row, and a list entry for every sequence that has room left.
"""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

GROUPS_PER_PIECE = 65536


class Groups(Sequence[tuple[int, ...]]):
    """Row indices of each sequence: group i is `rows[offsets[i]:offsets[i + 1]]`."""

    def __init__(self, rows: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
        self.rows = rows
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, end = self.offsets[index % len(self)], self.offsets[index % len(self) + 1]
        return tuple(self.rows[start:end].tolist())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return (self[number] for number in range(len(self)))

    def lengths_and_rows(self) -> Iterator[NDArray[np.int64]]:
        """For every group how many rows it has and then the rows, in pieces of many groups."""
        for start in range(0, len(self), GROUPS_PER_PIECE):
            offsets = self.offsets[start : start + GROUPS_PER_PIECE + 1]
            yield np.insert(self.rows[offsets[0] : offsets[-1]], offsets[:-1] - offsets[0], np.diff(offsets))

    def sums(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Per group, the sum of the values of its rows; no group is empty."""
        return np.add.reduceat(values[self.rows], self.offsets[:-1]) if len(self) else np.zeros(0, np.int64)


def pack(lengths: NDArray[np.int64], length_max: int) -> Groups:
    """Every row is in exactly one sequence, no sequence is longer than `length_max`.

    Longest rows first, each into the fullest sequence that still takes it; equal ones by index, so that the same
    lengths always give the same plan. Raises ValueError when a row is longer than a sequence.
    """
    order = np.argsort(-lengths, kind="stable")
    sequence_of = np.empty(len(order), np.int64)
    count = 0
    # open_by_room[r]: sequences with exactly r tokens of room; bit r of `rooms` is set while that list is not empty.
    # The tightest fit is then the lowest bit at or above a row's length: no search over sequences.
    open_by_room: dict[int, list[int]] = {}
    rooms = 0
    for place, row in enumerate(order):
        length = int(lengths[row])
        if not 0 < length <= length_max:
            raise ValueError(f"row {row} has {length} tokens; sequences take 1 to {length_max}")
        fitting = rooms >> length
        if fitting:
            room = length + ((fitting & -fitting).bit_length() - 1)
            sequence = open_by_room[room].pop()
            if not open_by_room[room]:
                rooms ^= 1 << room
        else:
            room = length_max
            sequence = count
            count += 1
        sequence_of[place] = sequence
        left = room - length
        if left:
            open_by_room.setdefault(left, []).append(sequence)
            rooms |= 1 << left
    # Stable: within a sequence, rows lie in the order in which they came.
    rows = order[np.argsort(sequence_of, kind="stable")]
    return Groups(rows, np.concatenate([[0], np.cumsum(np.bincount(sequence_of, minlength=count))]).astype(np.int64))


def even_groups(count: int, width: int) -> Groups:
    """Rows 0 to `count` in their order, `width` in a group."""
    return Groups(np.arange(count, dtype=np.int64), np.arange(0, count + 1, width, dtype=np.int64))

"""Packs rows into sequences of a maximum length by best fit decreasing. Deterministic; it knows lengths, not tokens."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], length_max: int) -> list[list[int]]:
    """Row indices per sequence. Every row is in exactly one, no sequence is longer than `length_max`.

    Longest rows first, each into the fullest sequence that still takes it; equal ones by index, so that the same
    lengths always give the same plan. Raises ValueError when a row is longer than a sequence.
    """
    sequences: list[list[int]] = []
    # open_by_room[r]: sequences with exactly r tokens of room; bit r of `rooms` is set while that list is not empty.
    # The tightest fit is then the lowest bit at or above a row's length: no search over sequences.
    open_by_room: dict[int, list[int]] = {}
    rooms = 0
    for row in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
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
            sequence = len(sequences)
            sequences.append([])
        sequences[sequence].append(row)
        left = room - length
        if left:
            open_by_room.setdefault(left, []).append(sequence)
            rooms |= 1 << left
    return sequences

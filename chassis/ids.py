"""Identifiers that sort by their time of birth, from the system's randomness or from a seed.

It knows no kind of resource: the prefix is the caller's.
"""

import random
import secrets
import uuid
from collections.abc import Callable
from typing import Protocol

from chassis.clock import Clock, SystemClock

# Crockford's base 32: no i, l, o or u, so that an id can be read aloud; its order is the order of the digits.
ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_TIME_BITS, _RANDOM_BITS = 48, 80
_LENGTH = 26  # 130 bits of digits hold the 128 bits.
_STEP_BITS = 40


class Ids(Protocol):
    def new(self, prefix: str) -> str:
        """`ft` gives `ft-01jd...`, `proj_` gives `proj_01jd...`; later ids of one process sort later."""
        ...

    def uuid(self) -> uuid.UUID: ...


class _TimeSortedIds:
    def __init__(self, clock: Clock, random_bits: Callable[[int], int]) -> None:
        self._clock = clock
        self._random_bits = random_bits
        self._last = 0

    def new(self, prefix: str) -> str:
        milliseconds = int(self._clock.now().timestamp() * 1000)
        value = (milliseconds << _RANDOM_BITS) | self._random_bits(_RANDOM_BITS)
        if value >> _RANDOM_BITS <= self._last >> _RANDOM_BITS:
            # The same millisecond, or a clock that went back: go on from the last id by a random step, so that
            # order holds and the next id still cannot be guessed.
            value = self._last + 1 + self._random_bits(_STEP_BITS)
        self._last = value
        separator = "" if prefix.endswith(("-", "_")) else "-"
        return f"{prefix}{separator}{_digits(value)}"

    def uuid(self) -> uuid.UUID:
        return uuid.UUID(int=self._random_bits(128), version=4)


class SystemIds(_TimeSortedIds):
    """Unguessable ids for production."""

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__(clock or SystemClock(), secrets.randbits)


class SeededIds(_TimeSortedIds):
    """The same ids on every run, for tests."""

    def __init__(self, seed: int, clock: Clock | None = None) -> None:
        super().__init__(clock or SystemClock(), random.Random(seed).getrandbits)  # noqa: S311 - repeatable on purpose


def _digits(value: int) -> str:
    return "".join(ALPHABET[(value >> shift) & 31] for shift in range(5 * (_LENGTH - 1), -1, -5))

"""A difference between what is stored and what follows from the other rows."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where the books do not agree: `expected` follows from the other rows, `found` is stored."""

    check: str
    location: str
    expected: str
    found: str


def difference(check: str, location: str, expected: object, found: object) -> Difference:
    return Difference(check=check, location=location, expected=_shown(expected), found=_shown(found))


def first_unequal(pairs: Iterable[tuple[str, object, object]]) -> tuple[str, str] | None:
    """What is expected and what is found in the first of (name, recomputed, stored) whose two values differ."""
    for name, wanted, found in pairs:
        if wanted != found:
            return f"{name} {wanted}", f"{name} {found}"
    return None


def _shown(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    return "nothing" if value is None else str(value)

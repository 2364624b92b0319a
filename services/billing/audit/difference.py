"""A difference between what is stored and what follows from the other rows."""

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


def _shown(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    return "nothing" if value is None else str(value)

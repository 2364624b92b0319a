"""Pages of a list: sizes within bounds, and opaque tokens that say where the next page begins.

It knows no query: a token holds the sort key of the last row and is valid only for the list that made it.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence

from chassis.errors import FieldViolation, InvalidArgument

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 1000
TOKEN_CHARS_MAX = 1024

Cursor = tuple[str | int, ...]


def page_size(requested: int, *, default: int = PAGE_SIZE_DEFAULT, maximum: int = PAGE_SIZE_MAX) -> int:
    """Zero means the default and too large means the maximum, as AIP-158 wants; negative is InvalidArgument."""
    if requested < 0:
        raise _invalid("page_size", "must not be negative")
    return min(requested or default, maximum)


def encode_token(cursor: Sequence[str | int], *, scope: str) -> str:
    """`scope` says which list this is, with everything that changes its rows or their order: parent, filter, method."""
    packed = json.dumps([_digest(scope), *cursor], separators=(",", ":"), ensure_ascii=False)
    return base64.urlsafe_b64encode(packed.encode()).decode().rstrip("=")


def decode_token(token: str, *, scope: str, kinds: Sequence[type[str] | type[int]]) -> Cursor | None:
    """The cursor, checked against the `kinds` of its values; None for the first page (an empty token)."""
    if not token:
        return None
    if len(token) > TOKEN_CHARS_MAX:
        raise _invalid("page_token", "is not a token of this list; begin again without one")
    try:
        values = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or not values or values[0] != _digest(scope):
        raise _invalid("page_token", "is not a token of this list; begin again without one")
    cursor = values[1:]
    if [type(value) for value in cursor] != list(kinds):
        raise _invalid("page_token", "is not a token of this list; begin again without one")
    return tuple(cursor)


def _digest(scope: str) -> str:
    return hashlib.sha256(scope.encode()).hexdigest()[:12]


def _invalid(field: str, description: str) -> InvalidArgument:
    return InvalidArgument("INVALID_FIELD", f"{field} {description}", violations=[FieldViolation(field, description)])

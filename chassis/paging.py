"""Pages of a list: sizes within bounds, and opaque tokens that say where the next page begins.

It knows no query: a token holds the sort key of the last row. It is signed, so that it is valid only for the list that
made it, and what comes back is what was given out: a forged cursor reaches no query.
"""

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol, TypeVar

from chassis.errors import InvalidArgument, invalid

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 1000
TOKEN_CHARS_MAX = 1024
_SIGNATURE_BYTES = 16

TIME_KINDS = (int, str)

Cursor = tuple[str | int, ...]
Row = TypeVar("Row")
Value = TypeVar("Value", str, int)
Key = TypeVar("Key")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ListRequest(Protocol):
    """What every request for a list has."""

    page_size: int
    page_token: str


class Pages:
    """Reads what requests for lists ask for, and signs their tokens with `key`, which all replicas of a service share.
    Without one they end with this process: the settings' `page_token_key` says what that means."""

    def __init__(self, key: str) -> None:
        self._key = hashlib.sha256(key.encode()).digest() if key else secrets.token_bytes(32)

    def read(
        self, request: ListRequest, *, scope: str, kinds: Sequence[type[str] | type[int]], maximum: int = PAGE_SIZE_MAX
    ) -> "Page":
        """The page that a request asks for; `scope` and `kinds` as in `encode` and `decode`."""
        return Page(
            size=page_size(request.page_size, maximum=maximum),
            cursor=self.decode(request.page_token, scope=scope, kinds=kinds),
            scope=scope,
            pages=self,
        )

    def encode(self, cursor: Cursor, *, scope: str) -> str:
        """`scope` says which list this is, with everything that changes its rows or their order: parent, filter."""
        packed = json.dumps(cursor, separators=(",", ":"), ensure_ascii=False).encode()
        return base64.urlsafe_b64encode(self._signature(packed, scope) + packed).decode().rstrip("=")

    def decode(self, token: str, *, scope: str, kinds: Sequence[type[str] | type[int]]) -> Cursor | None:
        """The cursor, checked against the `kinds` of its values; None for the first page (an empty token)."""
        if not token:
            return None
        if len(token) > TOKEN_CHARS_MAX:
            raise invalid_token()
        try:
            signed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise invalid_token() from None
        signature, packed = signed[:_SIGNATURE_BYTES], signed[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._signature(packed, scope)):
            raise invalid_token()
        cursor = json.loads(packed)
        # Ours, but of a version of this list that had another order.
        if [type(value) for value in cursor] != list(kinds):
            raise invalid_token()
        return tuple(cursor)

    def _signature(self, packed: bytes, scope: str) -> bytes:
        # The scope's digest has one length, so that no other pair of both gives the same bytes.
        signed = hashlib.sha256(scope.encode()).digest() + packed
        return hmac.digest(self._key, signed, "sha256")[:_SIGNATURE_BYTES]


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page of the list named `scope`: at most `size` rows after `cursor`, or from the start where that is None."""

    size: int
    cursor: Cursor | None
    scope: str
    pages: Pages

    @property
    def row_max(self) -> int:
        """How many rows to read: one more than the page shows says whether another page follows."""
        return self.size + 1

    def after(self, start: Value) -> Value:
        """The single value of the cursor; `start` on the first page."""
        if self.cursor is None:
            return start
        (value,) = self.cursor
        assert isinstance(value, type(start)), "the kinds were checked"
        return value

    def after_time(self, read_key: Callable[[str], Key]) -> tuple[datetime, Key] | None:
        """The moment and the key of a `time_cursor`; None on the first page. `read_key` raises ValueError."""
        if self.cursor is None:
            return None
        microseconds, key = self.cursor
        try:
            return _EPOCH + int(microseconds) * datetime.resolution, read_key(str(key))
        except (ValueError, OverflowError):
            raise invalid_token() from None

    def cut(self, rows: Sequence[Row], cursor_of: Callable[[Row], Cursor]) -> tuple[Sequence[Row], str]:
        """The rows that the page shows, and the token of the next page; of `row_max` rows that were read."""
        shown = rows[: self.size]
        return shown, self.token(cursor_of(shown[-1])) if len(rows) > self.size else ""

    def token(self, cursor: Cursor) -> str:
        """The token of the page after `cursor`."""
        return self.pages.encode(cursor, scope=self.scope)


def page_size(requested: int, *, default: int = PAGE_SIZE_DEFAULT, maximum: int = PAGE_SIZE_MAX) -> int:
    """Zero means the default and too large means the maximum, as AIP-158 wants; negative is InvalidArgument."""
    if requested < 0:
        raise invalid("page_size", "must not be negative")
    return min(requested or default, maximum)


def time_cursor(moment: datetime, key: object) -> Cursor:
    """The cursor of a list that is sorted by a moment and a key; its kinds are `TIME_KINDS`."""
    return (moment - _EPOCH) // datetime.resolution, str(key)


def invalid_token() -> InvalidArgument:
    """The error for a token that this list did not make, also where only its handler can tell."""
    return invalid("page_token", "is not a token of this list; begin again without one")

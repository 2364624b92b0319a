"""API key secrets: how one is made, recognised and hashed. It knows no database and no caller."""

import hashlib
import secrets
import zlib
from collections.abc import Callable

PREFIX = "fm_"
# 43 digits of base 62 carry 256 random bits.
RANDOM_CHARS = 43
# A checksum lets the door refuse typing mistakes and made-up keys without asking the database.
CHECKSUM_CHARS = 6
SECRET_CHARS = len(PREFIX) + RANDOM_CHARS + CHECKSUM_CHARS
# What is stored in clear so that people recognise a key: the prefix and 6 digits, far from enough to guess the rest.
SHOWN_CHARS = len(PREFIX) + 6

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def new_secret(random_below: Callable[[int], int] = secrets.randbelow) -> str:
    """`fm_`, 43 random digits, 6 digits of checksum; `random_below(n)` gives 0 to n-1."""
    body = "".join(_DIGITS[random_below(len(_DIGITS))] for _ in range(RANDOM_CHARS))
    return f"{PREFIX}{body}{_checksum(body)}"


def is_well_formed(secret: str) -> bool:
    """Whether `secret` could be a key of ours; says nothing about whether it exists."""
    if len(secret) != SECRET_CHARS or not secret.startswith(PREFIX) or not secret.isascii() or not secret[3:].isalnum():
        return False
    body = secret[len(PREFIX) : -CHECKSUM_CHARS]
    return secret[-CHECKSUM_CHARS:] == _checksum(body)


def digest(secret: str) -> bytes:
    """What is stored instead of the secret. Plain SHA-256 suffices: 256 random bits leave nothing to guess."""
    return hashlib.sha256(secret.encode()).digest()


def shown_prefix(secret: str) -> str:
    return secret[:SHOWN_CHARS]


def _checksum(body: str) -> str:
    value, digits = zlib.crc32(body.encode()), ""
    for _ in range(CHECKSUM_CHARS):
        value, digit = divmod(value, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return digits

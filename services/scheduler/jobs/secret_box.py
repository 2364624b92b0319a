"""Seals what must not lie readable in the database: AES-256-GCM (NIST SP 800-38D).

The key is derived from the operator's. What is sealed is bound to a name and opens under no other. It knows no table
and keeps no plain text.
"""

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
NONCE_BYTES = 12
# Hexadecimal digits of 128 bits; a shorter key was typed by somebody.
KEY_CHARS_MIN = 32
_PURPOSE = b"finemesh scheduler job secrets 1"


class SecretBox:
    """`key` is a random text of at least KEY_CHARS_MIN characters; ValueError for a shorter one."""

    def __init__(self, key: str) -> None:
        if len(key) < KEY_CHARS_MIN:
            raise ValueError(f"the key for secrets must have at least {KEY_CHARS_MIN} characters")
        derived = HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=_PURPOSE).derive(key.encode())
        self._cipher = AESGCM(derived)

    def seal(self, plain: bytes, bound_to: str) -> bytes:
        """Nonce and ciphertext. Every call takes a new random nonce."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plain, bound_to.encode())

    def open(self, sealed: bytes, bound_to: str) -> bytes | None:
        """None when it was sealed with another key, for another name, or was changed since."""
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], bound_to.encode())
        except (InvalidTag, ValueError):
            return None

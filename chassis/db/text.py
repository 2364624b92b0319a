"""Makes text from outside storable: what PostgreSQL cannot hold becomes the replacement character, never an error.

A NUL and half of a surrogate pair are what JSON and templates may hold and a text column may not. It knows no table.
"""

import json
import re
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def storable(value: str) -> str:
    return _UNSTORABLE.sub(_REPLACEMENT, value)


def text_to_bytes(value: str) -> bytes:
    """How every text parameter is sent; asyncpg sends arrays of text itself, so a store makes their texts storable."""
    if value.isascii() and "\0" not in value:
        return value.encode()
    return storable(value).encode()


def json_to_text(value: Any) -> str:
    """How every JSON parameter is sent."""
    text = json.dumps(value)
    # Escapes of both look so, and few harmless ones.
    return json.dumps(_cleaned(value)) if "\\u0000" in text or "\\ud" in text else text


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(each) for each in value]
    return value

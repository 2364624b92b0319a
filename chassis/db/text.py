"""Makes text from outside storable: what PostgreSQL cannot hold becomes the replacement character, never an error.

A NUL and half of a surrogate pair are what JSON and templates may hold and a text column may not. It knows no table.
"""

import json
from typing import Any

from chassis.storable import storable


def text_to_bytes(value: str) -> bytes:
    """How every text parameter is sent; for the texts of arrays see `storable_argument`."""
    if value.isascii() and "\0" not in value:
        return value.encode()
    return storable(value).encode()


def storable_argument(value: Any) -> Any:
    """A parameter whose array, if it is one, holds storable texts; the same object where nothing has to change."""
    if type(value) not in (list, tuple) or all(_is_plain(each) for each in value):
        return value
    return [storable(each) if isinstance(each, str) else storable_argument(each) for each in value]


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return value.isascii() and "\0" not in value
    return type(value) not in (list, tuple)


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

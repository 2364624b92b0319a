"""Describes a value of a stranger's file in a few words that are safe to send and to print."""

from typing import Any

_CHARS_MAX = 80
_KEY_CHARS_MAX = 60


def describe(value: Any) -> str:
    """At most about 80 printable characters, whatever the value is."""
    if isinstance(value, str):
        shown = printable(value[:_CHARS_MAX])
        return f'"{shown}"' if len(value) <= _CHARS_MAX else f'"{shown}…"'
    if isinstance(value, dict):
        keys = ", ".join(shown_key(key) for key in list(value)[:4])
        return f"an object with the keys {keys}"[:_CHARS_MAX] if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)} items" if value else "an empty list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        # A number of thousands of digits is legal JSON and not legal to print.
        return f"the number {value}" if -(10**20) < value < 10**20 else "a huge number"
    return f"the number {value}"


def describe_entry(document: dict[str, Any], key: str) -> str:
    """What stands under `key`, or that nothing does."""
    return describe(document[key]) if key in document else "nothing"


def shown_key(key: str) -> str:
    """A key as part of a path or a sentence."""
    return printable(key[:_KEY_CHARS_MAX])[:_KEY_CHARS_MAX]


def printable(text: str) -> str:
    """Escapes what cannot be printed."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)

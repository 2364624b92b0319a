"""Reads single fields of a parsed JSON object."""

from collections.abc import Set
from typing import Any

from formats.descriptions import describe, describe_entry
from formats.row_errors import LineFaults
from formats.strict_json import has_lone_surrogate


def said(document: dict[str, Any]) -> dict[str, Any]:
    """The entries that say something: null does not. Arrow writes it wherever another row has the key, and clients
    dump their objects with it."""
    return {key: value for key, value in document.items() if value is not None}


def read_text(document: dict[str, Any], key: str, parent: str, faults: LineFaults, *, may_be_empty: bool) -> str | None:
    """None when something is wrong. `parent` is the path of `document`."""
    value = document.get(key)
    if not isinstance(value, str):
        faults.add(f"{parent}.{key}", "a string", describe_entry(document, key))
    elif not value and not may_be_empty:
        faults.add(f"{parent}.{key}", "a string that is not empty", "an empty string")
    elif has_lone_surrogate(value):
        faults.add(f"{parent}.{key}", "text without unpaired surrogates", describe(value))
    else:
        return value
    return None


def read_optional_text(document: dict[str, Any], key: str, parent: str, faults: LineFaults) -> str | None:
    """None also when there is none."""
    if document.get(key) is None:
        return None
    return read_text(document, key, parent, faults, may_be_empty=False)


def unknown_keys(document: dict[str, Any], known: Set[str]) -> list[str]:
    """Keys that have no meaning, in alphabetical order."""
    return [] if document.keys() <= known else sorted(document.keys() - known)

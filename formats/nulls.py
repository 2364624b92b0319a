"""Leaves out what says nothing, at any depth: keys whose value is null.

Arrow gives every object all keys of its column, so a tool declares the parameters of all other tools, each null.
"""

from typing import Any, cast

# Below these keys of a JSON schema the keys are names of somebody's choice, each with a schema of its own.
_NAMES = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
# Keywords of a JSON schema whose null is a value; every other keyword's null is none.
_NULL_IS_A_VALUE = frozenset({"default", "const"})


def said_throughout(value: dict[str, Any]) -> dict[str, Any] | None:
    """Without null under any key; nulls in lists stay. None for brackets nested too deeply."""
    try:
        return cast(dict[str, Any], _said(value))
    except RecursionError:
        return None


def said_of_schema(value: dict[str, Any]) -> dict[str, Any] | None:
    """As `said_throughout`, of a declaration with JSON schemas: a default of null is one."""
    try:
        return cast(dict[str, Any], _schema(value, named=False))
    except RecursionError:
        return None


def _said(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _said(each) for key, each in value.items() if each is not None}
    return [_said(each) for each in value] if isinstance(value, list) else value


def _schema(value: Any, *, named: bool) -> Any:
    if isinstance(value, list):
        return [_schema(each, named=False) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: each if key in _NULL_IS_A_VALUE and not named else _schema(each, named=key in _NAMES and not named)
        for key, each in value.items()
        if each is not None or (key in _NULL_IS_A_VALUE and not named)
    }

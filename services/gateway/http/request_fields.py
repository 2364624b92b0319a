"""Reads parameters of a JSON request one by one; what cannot be honoured is refused by name. It knows no route."""

import json
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from chassis.errors import InvalidArgument
from chassis.storable import UNSTORABLE_TEXT, unstorable_in_json
from formats.fields import said
from formats.strict_json import json_object
from services.gateway.http.openai_errors import bad_param

INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
_NAME_CHARS_MAX = 100
_PATH_CHARS_MAX = 200


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What a route does with its parameters: those that it reads, those that change nothing in an answer, and those
    that are fine as long as they ask for what happens anyway."""

    read: Set[str]
    ignored: Set[str]
    fixed: Mapping[str, tuple[Any, ...]]


def read_object(body: bytes, known: Parameters) -> dict[str, Any]:
    """The parameters that say something; a null does not. InvalidArgument for a body that is no JSON object, and for a
    parameter that is not known."""
    try:
        document = json_object(body)
    except ValueError as error:
        raise InvalidArgument("INVALID_FIELD", f"the body is no JSON object: {error}; send one in UTF-8") from error
    path = unstorable_in_json(document)
    if path is not None:
        raise bad_param(path[:_PATH_CHARS_MAX], UNSTORABLE_TEXT)
    fields = said(document)
    for name, value in fields.items():
        if name in known.read or name in known.ignored:
            continue
        allowed = known.fixed.get(name)
        if allowed is None:
            raise bad_param(name[:_NAME_CHARS_MAX], "is not supported here; leave it out")
        if not any(value == fixed and type(value) is type(fixed) for fixed in allowed):
            raise bad_param(name, f"only {json.dumps(allowed[0])} is supported here; leave it out")
    return fields


def read_model(fields: Mapping[str, Any]) -> str:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise bad_param("model", "must be the id of a model, as /v1/models lists them")
    return model


def read_part(fields: Mapping[str, Any], name: str, known: Set[str], parent: str = "") -> dict[str, Any]:
    """An object among the parameters, without what says nothing; empty without one. `parent` is the path of
    `fields`."""
    path = f"{parent}.{name}" if parent else name
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_param(path, "must be an object")
    part = said(value)
    for key in sorted(part.keys() - known):
        raise bad_param(f"{path}.{key[:_NAME_CHARS_MAX]}", "is not supported here; leave it out")
    return part


def boolean(fields: Mapping[str, Any], name: str, parent: str = "") -> bool | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_param(f"{parent}.{name}" if parent else name, "must be true or false")
    return value


def integer(fields: Mapping[str, Any], name: str, minimum: int, maximum: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise bad_param(name, f"must be a whole number from {minimum} to {maximum}")
    return value


def number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e6 or not math.isfinite(value):
        raise bad_param(name, "must be a number")
    return float(value)

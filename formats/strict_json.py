"""JSON as the standard has it: what Python's decoder takes or drops silently is an error here."""

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

_KEY_CHARS_MAX = 60
_DIGITS_MAX = 4300


def strict_json(text: str) -> Any:
    """Raises ValueError, also for NaN, Infinity, numbers too large to be held and a key that comes twice in one object.
    Its text is for the author of the document.

    Brackets that are nested too deeply raise RecursionError.
    """
    return _DECODER.decode(text)


def json_value(content: bytes) -> Any:
    """A document in UTF-8. Raises ValueError saying what is wrong, also of brackets nested too deeply."""
    return _parsed(content, strict_json)


def json_object(content: bytes) -> dict[str, Any]:
    """As `json_value`, of an object."""
    return _object(json_value(content))


def _parsed(content: bytes, parse: Callable[[str], Any]) -> Any:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start}") from error
    if text.startswith("\ufeff"):
        raise ValueError("a byte order mark stands before the document; save it without")
    try:
        return parse(text)
    except RecursionError as error:
        raise ValueError("brackets nested too deeply") from error


def _object(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def loose_object(content: bytes) -> dict[str, Any]:
    """An object in UTF-8 as the authors of models write it and their libraries read it: what is dropped silently there
    is dropped here. Raises ValueError as `json_object` does."""
    return _object(_parsed(content, json.loads))


def is_sound_json(value: Any) -> bool:
    """Whether a parsed value can be written again as UTF-8."""
    try:
        return not has_lone_surrogate(_ENCODER.encode(value))
    except RecursionError:
        return False


def has_lone_surrogate(text: str) -> bool:
    """JSON can spell half of a surrogate pair; no tokenizer and no UTF-8 can hold it."""
    if text.isascii():
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no JSON")


def _whole(number: str) -> int:
    # Python's own limit, whose error speaks of how to change it.
    if len(number) > _DIGITS_MAX:
        raise ValueError(f"a whole number of more than {_DIGITS_MAX} digits")
    return int(number)


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError("a number too large to be held")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:_KEY_CHARS_MAX]!a} twice in one object")
            seen.add(name)
    return found


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole, object_pairs_hook=_unique
)
_ENCODER = json.JSONEncoder(ensure_ascii=False)

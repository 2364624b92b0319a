"""Which text can be kept: a PostgreSQL column holds no NUL and no half of a surrogate pair. It knows no table."""

import re
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")

# What is told about text that cannot be kept, after the name of its field.
UNSTORABLE_TEXT = "holds a NUL character or half of a surrogate pair, which no table can keep; send it without"


def is_storable(value: str) -> bool:
    return _UNSTORABLE.search(value) is None


def storable(value: str) -> str:
    """The same text with the replacement character where something cannot be kept: for text that nobody typed."""
    return _UNSTORABLE.sub(_REPLACEMENT, value)


def unstorable_in_json(document: Any) -> str | None:
    """The path to a text of a parsed document that cannot be kept, such as `messages[0].content`; None without one. A
    key is named by the path to its value.

    Without recursion: a document may be nested as deeply as its parser allows. And without a path for every value: in
    a deep document those would be many times as long as it is.
    """
    waiting: list[tuple[_Place | None, Any]] = [(None, document)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, str):
            if not is_storable(value):
                return _path(place)
        elif isinstance(value, dict):
            for key, each in value.items():
                if not is_storable(key):
                    return _path((place, key))
                waiting.append(((place, key), each))
        elif isinstance(value, list):
            waiting += [((place, index), each) for index, each in enumerate(value)]
    return None


# The place of the value around it, and the key or the index in that.
_Place = tuple[Any, str | int]


def _path(place: _Place | None) -> str:
    steps: list[str] = []
    while place is not None:
        place, step = place
        steps.append(f"[{step}]" if isinstance(step, int) else f".{storable(step)}")
    return "".join(reversed(steps)).removeprefix(".")

"""Reads the content of a message: a text, or a list of parts that are texts."""

from typing import Any

from formats.descriptions import describe, describe_entry, shown_key
from formats.fields import read_text, said, unknown_keys
from formats.row_errors import LineFaults

# Between the parts of one content, as vLLM's server and llama.cpp's join them: parts are blocks, and words of two of
# them must not run together.
PART_BREAK = "\n"
# A mark for caches changes nothing in the text.
_PART_KEYS = frozenset({"type", "text", "cache_control"})


def read_content(message: dict[str, Any], parent: str, faults: LineFaults) -> str | None:
    """None when something is wrong. `parent` is the path of `message`."""
    value, path = message.get("content"), f"{parent}.content"
    if isinstance(value, str):
        return read_text(message, "content", parent, faults, may_be_empty=True)
    if not isinstance(value, list) or not value:
        faults.add(path, "a string, or a list of text parts", describe_entry(message, "content"))
        return None
    texts = [_text(part, f"{path}[{index}]", faults) for index, part in enumerate(value)]
    return None if None in texts else PART_BREAK.join(text for text in texts if text is not None)


def _text(value: Any, path: str, faults: LineFaults) -> str | None:
    expectation = '{"type": "text", "text": "..."}: only text is supported'
    if not isinstance(value, dict):
        faults.add(path, expectation, describe(value))
        return None
    part = said(value)
    if part.get("type") != "text":
        faults.add(path, expectation, f"the type {describe_entry(part, 'type')}")
        return None
    unknown = unknown_keys(part, _PART_KEYS)
    for key in unknown:
        faults.add(f"{path}.{shown_key(key)}", "no such key: a text part has type and text", "a key")
    text = read_text(part, "text", path, faults, may_be_empty=True)
    return None if unknown else text

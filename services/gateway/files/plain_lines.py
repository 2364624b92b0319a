"""Sees at once that lines are sound and plain, so that the check of a large file is fast. Pure.

Most files hold nothing but conversations of plain messages, prompts with completions, or texts. What is not seen to be
such a line here is not wrong: the parser of formats/ reads it and has the last word. So this may only ever be stricter.
"""

import re
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from formats.rows import Format

# A key is a string with a colon behind it. Text may look like that, too, so there are at least as many as keys.
_KEY_END = re.compile(rb'"[ \t\n\r]*:')
_LINE_BREAK, _QUOTE, _COLON, _OPEN, _CLOSE = b'\n":{}'
# Blank, tab, line break and carriage return come before this; so does what may not stand in JSON.
_AFTER_BLANK = ord("!")


class _Message(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    role: Literal["system", "user", "assistant"]
    content: str


class _Conversation(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    messages: list[_Message]


class _Instruction(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    prompt: str
    completion: str


class _Text(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    text: str


_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {
    "conversation": msgspec.json.Decoder(_Conversation),
    "instruction": msgspec.json.Decoder(_Instruction),
    "text": msgspec.json.Decoder(_Text),
}


class PlainLines:
    """Of one format; one that has no plain lines has none here."""

    def __init__(self, kind: Format, messages_max: int) -> None:
        self._decoder = _DECODERS.get(kind)
        self._messages_max = messages_max

    def rows_of(self, lines: bytes) -> int:
        """How many rows these whole lines are; 0 when it is not seen that all are rows of the format, each without an
        error and without a feature."""
        if self._decoder is None:
            return 0
        try:
            rows = self._decoder.decode_lines(lines)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return 0
        codes = np.frombuffer(lines, np.uint8)
        if not rows or len(rows) != _objects_on_lines(codes):
            return 0
        keys = self._keys_of(rows)
        # The decoder takes a key that comes twice; then there are more ends of keys than it found keys.
        return len(rows) if keys and keys == _key_ends(lines, codes) else 0

    def _keys_of(self, rows: list[Any]) -> int:
        """How many keys the rows have; 0 when one of them has an error."""
        first = rows[0]
        if isinstance(first, _Instruction):
            return 2 * len(rows) if all([row.completion for row in rows]) else 0
        if isinstance(first, _Text):
            return len(rows) if all([row.text for row in rows]) else 0
        keys = len(rows)
        for row in rows:
            roles = [message.role for message in row.messages]
            if len(roles) > self._messages_max or "assistant" not in roles:
                return 0
            keys += 2 * len(roles)
        return keys


def _objects_on_lines(codes: NDArray[np.uint8]) -> int:
    """The number of lines; 0 when not every one begins and ends with a bracket of an object.

    Within JSON no line break stands between the end and the beginning of two objects, so each line is a whole number of
    them.
    """
    breaks = np.flatnonzero(codes == _LINE_BREAK)
    begins = np.concatenate([[0], breaks[:-1] + 1])
    is_whole = bool((codes[breaks - 1] == _CLOSE).all()) and bool((codes[begins] == _OPEN).all())
    return len(breaks) if is_whole else 0


def _key_ends(lines: bytes, codes: NDArray[np.uint8]) -> int:
    """How often a string, or what looks like the end of one, has a colon behind it."""
    colons = codes[1:] == _COLON
    if bool((colons & (codes[:-1] < _AFTER_BLANK)).any()):
        return len(_KEY_END.findall(lines))
    return int(np.count_nonzero(colons & (codes[:-1] == _QUOTE)))

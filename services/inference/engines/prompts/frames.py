"""How questions and answers travel between an engine and the processes that render its prompts. Pure.

A question is JSON after its length. An answer is a kind, a length and bytes, never anything that could run: whoever
writes it works with a stranger's template.
"""

from __future__ import annotations

import enum
import json
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Any

# To the process that forks: what to do, and the number of the worker.
ORDER = struct.Struct("<cI")
FORK, KILL = b"F", b"K"
LENGTH = struct.Struct("<I")
HEAD = struct.Struct("<BI")
# Texts and words of an answer; ids are bounded by what was asked for.
WORDS_BYTES_MAX = 1 << 20


class Kind(enum.IntEnum):
    """What an answer says. After those from BROKEN on, the process that gave it ends."""

    IDS = 0
    TEXTS = 1
    TOO_MANY = 2  # tokens; their number
    REFUSED = 3  # by the template; its words
    BROKEN = 4  # the library fell over; its words
    MEMORY = 5


def pack_question(question: dict[str, Any]) -> bytes:
    """Surrogates that stand alone come through: what they are worth is for the tokenizer to say."""
    body = json.dumps(question, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return LENGTH.pack(len(body)) + body


def unpack_question(body: bytes) -> Any:
    return json.loads(body.decode("utf-8", "surrogatepass"))


def pack_answer(kind: Kind, body: bytes = b"") -> bytes:
    return HEAD.pack(kind, len(body)) + body


def pack_words(kind: Kind, words: str) -> bytes:
    return pack_answer(kind, words.encode("utf-8", "replace")[:WORDS_BYTES_MAX])


def pack_ids(ids: Sequence[int]) -> bytes:
    return pack_answer(Kind.IDS, _little(array("I", ids)).tobytes())


def unpack_ids(body: bytes) -> tuple[int, ...]:
    ids = array("I")
    ids.frombytes(body)
    return tuple(_little(ids))


def _little(ids: array[int]) -> array[int]:
    if sys.byteorder == "big":
        ids.byteswap()
    return ids

"""Finds where the words of each message stand in a rendered conversation: by a second rendering in which every field
carries a mark on both sides.

The marks are inside of the white space that templates trim. They must change nothing: the second rendering without them
has to be the first one, letter for letter. It knows no template and judges nothing.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from formats.prompts.chat_template import GENERATION_BEGIN, GENERATION_END
from formats.prompts.plain_messages import REASONING_NAMES

Span = tuple[int, int]
# Renders messages, with these variables besides the usual ones.
Render = Callable[[Sequence[Mapping[str, Any]], Mapping[str, str]], str]

# Letters and digits alone: JSON and other spellings leave them as they are.
_STEM = "Qfmx"
_DIGITS = 6
_GENERATED = (0, 1)
# Arguments deeper than this carry no marks.
_DEPTH_MAX = 16


@dataclass(frozen=True, kw_only=True)
class FieldPlaces:
    """Of each message where its first field that is in the text begins and its last one ends, in characters; None of a
    message that left no trace. Of the messages in `calls_lost` a tool call left none. `generated` are the parts inside
    of `{% generation %}`."""

    begins: list[int | None]
    ends: list[int | None]
    calls_lost: frozenset[int]
    generated: list[Span]


def find_fields(
    text: str, messages: Sequence[Mapping[str, Any]], render: Render, sought: Iterable[str]
) -> FieldPlaces | None:
    """Of the rendering `text` of `messages`. None when the marks changed the rendering, or its order is another one.

    The words of users and tools that hold one of the `sought` texts carry no mark: it might hide that text from the
    template.
    """
    marks = _Marks(stem=_unused_stem(text))
    marked = [marks.message(index, message, sought) for index, message in enumerate(messages)]
    variables = {GENERATION_BEGIN: marks.text(_GENERATED[0]), GENERATION_END: marks.text(_GENERATED[1])}
    plain, found = _without_marks(render(marked, variables), marks.stem)
    if plain != text:
        return None
    begins, ends = _first_and_last(found, marks.owners, len(messages))
    if not _in_order(begins, ends):
        return None
    seen = {number for number, _ in found}
    lost = frozenset(marks.owners[number] for number in marks.call_names if number not in seen)
    return FieldPlaces(begins=begins, ends=ends, calls_lost=lost, generated=_generated(found))


@dataclass
class _Marks:
    """Hands out marks. Numbers are even before a field and odd behind it; `owners` is the message of each number."""

    stem: str
    owners: list[int] = field(default_factory=lambda: [-1, -1])
    call_names: list[int] = field(default_factory=list)

    def text(self, number: int) -> str:
        return f"{self.stem}{number:0{_DIGITS}x}"

    def message(self, index: int, message: Mapping[str, Any], sought: Iterable[str]) -> Mapping[str, Any]:
        role = message["role"]
        if role == "system" or (role != "assistant" and any(each in message["content"] for each in sought)):
            return message
        marked = {**message, "content": self._around(index, message["content"])}
        if "reasoning" in message:
            marked |= dict.fromkeys(REASONING_NAMES, self._around(index, message["reasoning"]))
        if "tool_calls" in message:
            marked["tool_calls"] = [self._call(index, call) for call in message["tool_calls"]]
        return marked

    def _call(self, index: int, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        self.call_names.append(len(self.owners))
        name = self._around(index, function["name"])
        return {**call, "function": {"name": name, "arguments": self._value(index, function["arguments"], _DEPTH_MAX)}}

    def _value(self, index: int, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            return self._around(index, value)
        if depth and isinstance(value, dict):
            return {key: self._value(index, each, depth - 1) for key, each in value.items()}
        if depth and isinstance(value, list):
            return [self._value(index, each, depth - 1) for each in value]
        return value

    def _around(self, index: int, words: str) -> str:
        core = words.strip()
        if not core:
            return words
        number = len(self.owners)
        self.owners += (index, index)
        begin = len(words) - len(words.lstrip())
        return f"{words[:begin]}{self.text(number)}{core}{self.text(number + 1)}{words[begin + len(core) :]}"


def _unused_stem(text: str) -> str:
    stem = _STEM
    while stem in text:
        stem += "q"
    return stem


def _without_marks(marked: str, stem: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and every mark as its number and its position there."""
    pieces: list[str] = []
    found: list[tuple[int, int]] = []
    position = length = 0
    for match in re.finditer(f"{stem}([0-9a-f]{{{_DIGITS}}})", marked):
        pieces.append(marked[position : match.start()])
        length += match.start() - position
        position = match.end()
        found.append((int(match[1], 16), length))
    pieces.append(marked[position:])
    return "".join(pieces), found


def _first_and_last(
    found: Sequence[tuple[int, int]], owners: Sequence[int], count: int
) -> tuple[list[int | None], list[int | None]]:
    begins: list[int | None] = [None] * count
    ends: list[int | None] = [None] * count
    seen: set[int] = set()
    for number, position in found:
        # What comes once more belongs to another message, as the name of a call stands before its result.
        if number in _GENERATED or number in seen:
            continue
        seen.add(number)
        owner = owners[number]
        if begins[owner] is None:
            begins[owner] = position
        ends[owner] = position
    return begins, ends


def _in_order(begins: Sequence[int | None], ends: Sequence[int | None]) -> bool:
    before = 0
    for begin, end in zip(begins, ends, strict=True):
        if begin is None or end is None:
            continue
        if begin < before:
            return False
        before = end
    return True


def _generated(found: Sequence[tuple[int, int]]) -> list[Span]:
    """One block inside of another one is part of it, and an empty one is none."""
    spans: list[Span] = []
    opened: list[int] = []
    for number, position in found:
        if number == _GENERATED[0]:
            opened.append(position)
        elif number == _GENERATED[1] and opened:
            begin = opened.pop()
            if not opened and begin < position:
                spans.append((begin, position))
    return spans

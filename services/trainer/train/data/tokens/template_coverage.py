"""Checks that a rendered conversation holds everything that its messages say.

A template may leave out what it does not know, such as tool calls or reasoning. Such a row is refused, because nothing
may be dropped unseen. It knows no template and no tokenizer.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from formats.rows import Message
from services.trainer.train.data.tokens.template_refusals import (
    TOOLS,
    TemplateRefusal,
    call_left_out,
    left_out,
    reasoning_left_out,
)

# A text is looked for close behind the one before it first, within this and some times its own length.
_NEAR_CHARACTERS = 16 * 1024
_SPELLED_LONGER = 6


def check_context(rendered: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
    """Checks the whole text, which is what the model reads. Earlier answers without loss may lose their reasoning and
    be rewritten, as at inference, but they must keep their tool calls. Raises TemplateRefusal."""
    seen = _Seen(rendered)
    if not all(seen.holds(tool["function"]["name"]) for tool in tools):
        raise TemplateRefusal("a chat template that takes tools; the one of this base model leaves some out", TOOLS)
    for index, message in enumerate(messages):
        if message.role != "assistant" and not seen.holds(message.content):
            raise left_out("content", index, message)
        _check_calls(seen, index, message)


def check_answer(rendered: str, index: int, message: Message, *, header: str = "", earlier: bool = False) -> None:
    """Checks the trained part of the text, which is what the model learns to say. The content may begin in the `header`
    before it, which opens a thought in some templates. `earlier` answers are those that others follow. Raises
    TemplateRefusal."""
    if message.role != "assistant":
        return
    core = message.content.strip()
    if core not in rendered and core not in header + rendered:
        raise left_out("content", index, message)
    if message.reasoning is not None and message.reasoning.strip() not in rendered:
        raise reasoning_left_out(index, earlier=earlier)
    _check_calls(_Seen(rendered), index, message)


def _check_calls(seen: "_Seen", index: int, message: Message) -> None:
    for call in message.tool_calls:
        if not all(seen.holds(text) for text in (call.name, *_texts(call.arguments))):
            raise call_left_out(index)


class _Seen:
    """A text in which others are looked for in their order, so that a long conversation is not read once for each."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def holds(self, words: str) -> bool:
        """Whether the words are there as they are, or spelt as in JSON or Python, which templates use for
        structures."""
        core = words.strip()
        near = self._position + _NEAR_CHARACTERS + _SPELLED_LONGER * len(words)
        found = self._text.find(core, self._position, near)
        if found >= 0:
            self._position = found
            return True
        spelled = [form[1:-1] for form in (json.dumps(words, ensure_ascii=False), json.dumps(words), repr(words))]
        for form in spelled:
            found = self._text.find(form, self._position, near)
            if found >= 0:
                self._position = found
                return True
        return any(form in self._text for form in (core, *spelled))


def _texts(value: Any) -> Iterator[str]:
    """Every key and every string of a JSON value. Numbers have too many spellings to be looked for."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value

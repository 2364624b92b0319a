"""Checks that a rendered conversation holds everything that its messages say.

A template may leave out what it does not know, such as tool calls or reasoning. Such a row is refused, because nothing
may be dropped unseen. It knows no template and no tokenizer.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from formats.rows import Message

TOOLS = "tools"


class TemplateRefusal(Exception):
    """This conversation does not fit the template. The text says what was expected. `part` says where: the index of a
    message, TOOLS, or None for the whole conversation."""

    def __init__(self, why: str, part: int | str | None = None) -> None:
        super().__init__(why)
        self.part = part


def check_context(rendered: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
    """Checks the whole text, which is what the model reads. Earlier answers without loss may lose their reasoning and
    be rewritten, as at inference, but they must keep their tool calls. Raises TemplateRefusal."""
    if not all(_holds(rendered, tool["function"]["name"]) for tool in tools):
        raise TemplateRefusal("a chat template that takes tools; the one of this base model leaves some out", TOOLS)
    for index, message in enumerate(messages):
        if message.role != "assistant" and not _holds(rendered, message.content):
            raise TemplateRefusal(f"a chat template that renders the content of message {index} as it is", index)
        _check_calls(rendered, index, message)


def check_answer(rendered: str, index: int, message: Message) -> None:
    """Checks the trained part of the text, which is what the model learns to say. Raises TemplateRefusal."""
    if message.role != "assistant":
        return
    if message.content.strip() not in rendered:
        raise TemplateRefusal(f"a chat template that renders the content of message {index} as it is", index)
    if message.reasoning is not None and message.reasoning.strip() not in rendered:
        raise TemplateRefusal(
            f"a chat template that renders the reasoning of message {index}; this one leaves it out (there are "
            f"templates that "
            "keep it only after the last question: give earlier answers weight 0, or rows of their own)",
            index,
        )
    _check_calls(rendered, index, message)


def _check_calls(rendered: str, index: int, message: Message) -> None:
    for call in message.tool_calls:
        if not all(_holds(rendered, text) for text in (call.name, *_texts(call.arguments))):
            raise TemplateRefusal(
                f"a chat template that renders the tool calls of message {index} with their arguments",
                index,
            )


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


def _holds(rendered: str, text: str) -> bool:
    """Whether the text is there as it is, or spelt as in JSON or Python, which templates use for structures."""
    if text.strip() in rendered:
        return True
    spelled = (json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text))
    return any(form[1:-1] in rendered for form in spelled)

"""Whether a rendered conversation holds what its messages say: a template may leave out what it does not know, and nothing may be
dropped unseen. It knows no template and no tokenizer.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from services.trainer.train.data.rows.row_types import Message

TOOLS = "tools"


class TemplateRefusal(Exception):
    """This conversation does not fit the template; the text says why, `place` where: the index of a message, or TOOLS, or None for the
    whole."""

    def __init__(self, why: str, place: int | str | None = None) -> None:
        super().__init__(why)
        self.place = place


def check_heard(rendered: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
    """What the model reads. Earlier answers without loss may lose their reasoning and be rewritten, as they are when the model is
    asked, but not their tool calls. Raises TemplateRefusal."""
    if not all(_holds(rendered, tool["function"]["name"]) for tool in tools):
        raise TemplateRefusal("a chat template that takes tools; the one of this base model leaves some out", TOOLS)
    for index, message in enumerate(messages):
        if message.role != "assistant" and not _holds(rendered, message.content):
            raise TemplateRefusal(f"a chat template that renders the content of message {index} as it is", index)
        _check_calls(rendered, index, message)


def check_said(rendered: str, index: int, message: Message) -> None:
    """What the model learns to say, in the part of the text that is trained for it. Raises TemplateRefusal."""
    if message.role != "assistant":
        return
    if message.content.strip() not in rendered:
        raise TemplateRefusal(f"a chat template that renders the content of message {index} as it is", index)
    if message.reasoning is not None and message.reasoning.strip() not in rendered:
        raise TemplateRefusal(
            f"a chat template that renders the reasoning of message {index}; this one leaves it out (there are templates that "
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
    """As it is, or in the spelling of JSON or of Python, which templates use for structures."""
    if text.strip() in rendered:
        return True
    spelled = (json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text))
    return any(form[1:-1] in rendered for form in spelled)

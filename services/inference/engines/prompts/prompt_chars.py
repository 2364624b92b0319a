"""How much text a conversation is, before anybody renders it. Pure."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from formats.rows import Message


def prompt_chars(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> int:
    """Characters of everything that the chat template is told."""
    return sum(map(_message_chars, messages)) + (len(json.dumps(list(tools), ensure_ascii=False)) if tools else 0)


def _message_chars(message: Message) -> int:
    chars = len(message.role) + len(message.content) + len(message.reasoning or "") + len(message.name or "")
    for call in message.tool_calls:
        chars += len(call.name) + len(json.dumps(call.arguments, ensure_ascii=False))
    return chars

"""Messages as chat templates take them: dictionaries with the keys that transformers' users write."""

from typing import Any

from formats.rows import Message

# What templates call it: those of gpt-oss know the last one.
REASONING_NAMES = ("reasoning", "reasoning_content", "thinking")


def plain(message: Message) -> dict[str, Any]:
    """Keys only for what is there, reasoning by all of its names."""
    entry: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        entry |= dict.fromkeys(REASONING_NAMES, message.reasoning)
    if message.tool_calls:
        entry["tool_calls"] = [
            {
                **({} if call.id is None else {"id": call.id}),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        entry["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        entry["name"] = message.name
    return entry

"""Conversations that chat templates of real families treat in ways of their own, and the templates that come in the
installed `trl`: of many families the one that its authors ship, X.jinja, and beside it X_training.jinja, in which other
people marked the assistant's words with `{% generation %}`.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from formats.messages import read_messages
from formats.prompts.plain_messages import plain
from formats.row_errors import LineFaults, RowErrors
from formats.rows import Conversation, Message

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "one"},
                "word": {"type": "string", "description": "how"},
            },
            "required": ["a"],
        },
    },
}
# Their content has to be a list of parts, because they take images: a text row is lost or refused.
VISION_ONLY = ("idefics3", "llava_next", "smolvlm")


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def calls(*numbers: int, content: str = "", **more: Any) -> dict[str, Any]:
    made = [
        {
            "id": f"call0000{number}",
            "type": "function",
            "function": {"name": "add", "arguments": {"a": number, "word": "exactly"}},
        }
        for number in numbers
    ]
    return said(content, tool_calls=made, **more)


def result(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "add", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


NORWAY = [user("Capital of Norway?"), said("Oslo.")]
ENTRIES: dict[str, list[dict[str, Any]]] = {
    "one turn": NORWAY,
    "system": [system("Be brief."), *NORWAY],
    "empty system": [system(""), *NORWAY],
    "several turns": [*NORWAY, user("Of Italy?"), said("Rome."), user("Of Peru?"), said("Lima.")],
    "last turn": [user("Capital of Norway?"), said("Oslo.", weight=0), user("Of Italy?"), said("Rome.")],
    "assistant first": [said("Hello."), *NORWAY],
    "users": [user("A question."), *NORWAY],
    "tools": [user("1 + 2?"), calls(1), result(1, "three"), said("It is 3.")],
    "tools and words": [user("1 + 2?"), calls(1, content="Let me see."), result(1, "three"), said("It is 3.")],
    "parallel calls": [user("Sums?"), calls(1, 2), result(1, "three"), result(2, "five"), said("3 and 5.")],
    "reasoning": [user("1 + 2?"), said("3.", reasoning="One and two.")],
    "reasoning turns": [user("1?"), said("2.", reasoning="Add one."), user("2?"), said("4.", reasoning="Add two.")],
    "reasoning last": [
        user("1?"), said("2.", reasoning="Add one.", weight=0), user("2?"), said("4.", reasoning="Add two."),
    ],
    "reasoning tools": [
        user("1 + 2?"), calls(1, reasoning="Ask."), result(1, "three"), said("It is 3.", reasoning="So."),
    ],
    "inline thought": [user("1 + 2?"), said("<think>\nOne and two.\n</think>\n\n3.")],
}  # fmt: skip
TOOL_ROWS = ("tools", "tools and words", "parallel calls", "reasoning tools")


def row(name: str) -> Conversation:
    return Conversation(line=1, messages=messages_of(ENTRIES[name]), tools=(TOOL,) if name in TOOL_ROWS else ())


def messages_of(entries: list[dict[str, Any]]) -> tuple[Message, ...]:
    errors = RowErrors()
    messages = read_messages(entries, "$", LineFaults(1, errors), set(), messages_max=1000)
    assert messages is not None, errors.kept
    return messages


def families() -> list[str]:
    return sorted(path.name.removesuffix("_training.jinja") for path in _folder().glob("*_training.jinja"))


def shipped(family: str) -> str:
    return (_folder() / f"{family}.jinja").read_text(encoding="utf-8")


def marked(family: str) -> str:
    return (_folder() / f"{family}_training.jinja").read_text(encoding="utf-8")


def _folder() -> Path:
    found = importlib.util.find_spec("trl")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "chat_templates"


def served_prompt(source: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
    """As a server renders it, by transformers."""
    (text,), _ = render_jinja_template(
        [[plain(message) for message in messages]],
        tools=list(tools) or None,
        chat_template=source,
        add_generation_prompt=True,
        **TOKENS,
    )
    return str(text)


def transformers_marks(source: str, asked: Conversation) -> tuple[str, list[tuple[int, int]]]:
    (text,), (marks,) = render_jinja_template(
        [[plain(message) for message in asked.messages]],
        tools=list(asked.tools) or None,
        chat_template=source,
        return_assistant_tokens_mask=True,
        **TOKENS,
    )
    return str(text), list(marks)

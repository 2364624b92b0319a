"""Why a row cannot be trained under a chat template, and what to do about it. It finds nothing out."""

from collections.abc import Sequence
from os.path import commonprefix

from formats.rows import Message

TOOLS = "tools"
# Characters of a rendering that are shown.
_SHOWN_LENGTH_MAX = 40
# What closes a thought that stands in the text of an answer.
_THOUGHT_ENDS = ("</think>", "</thinking>", "<|channel|>analysis")

EARLIER = "give earlier answers weight 0, or write a row for each answer"
ANOTHER = "import the model with another template (`finemesh models import --chat-template`)"
_REASONING = "put the thought into `reasoning`"


class TemplateRefusal(Exception):
    """This conversation does not fit the template. The text says what was expected. `part` says where: the index of a
    message, TOOLS, or None for the whole conversation."""

    def __init__(self, why: str, part: int | str | None = None) -> None:
        super().__init__(why)
        self.part = part


def asked_otherwise(prompt: str, text: str, header: str, index: int, messages: Sequence[Message]) -> TemplateRefusal:
    """`text` does not begin with the `prompt` of an answer, which ends with a `header`."""
    common = len(commonprefix([prompt, text]))  # noqa: RUF071 - of characters
    asked, found = (_shown(whole[common:]) for whole in (prompt, text))
    expected = (
        f"a chat template that renders what comes before answer {index} as it asks for that answer; this one asks "
        f"with {asked} where the whole conversation has {found}"
    )
    message = messages[index]
    in_header = common >= len(prompt) - len(header)
    if index < len(messages) - 1:
        cure = EARLIER
    elif in_header and holds_thought(message):
        cure = _REASONING
    elif in_header and message.reasoning is None:
        cure = f"if the answer has a thought, {_REASONING}, or into the text where the template takes it; or {ANOTHER}"
    elif in_header:
        cure = ANOTHER
    else:
        cure = f"leave out of earlier messages what it shows only there; or {ANOTHER}"
    return TemplateRefusal(f"{expected}: {cure}", index)


def header_learned(header: str, index: int) -> TemplateRefusal:
    """The answer would begin with the header that a prompt should have written."""
    why = f"a chat template that asks for answer {index} with {_shown(header)}, as the whole conversation has it"
    return TemplateRefusal(f"{why}: give that answer weight 0, or {ANOTHER}", index)


def joined_answer(prompt: str, answer: str) -> TemplateRefusal:
    """The tokenizer has no token that begins where the answer does."""
    why = (
        f"an answer that the tokenizer does not join with its prompt; {_shown(prompt[-8:])} goes on as {_shown(answer)}"
    )
    return TemplateRefusal(f"{why}: begin the answer with a word, or {ANOTHER}")


def no_prompt(index: int) -> TemplateRefusal:
    why = f"a question before answer {index}, which this chat template renders otherwise than it asks for answers"
    return TemplateRefusal(f"{why}: give that answer weight 0, or begin with a question", index)


def ended_otherwise(index: int, message: Message) -> TemplateRefusal:
    """What follows a message in the text is not what ends its turn."""
    if message.role != "assistant":
        why = (
            f"a chat template that renders a conversation up to message {index} as the beginning of the whole: let "
            f"train_on_inputs be auto, or give all messages weight 1"
        )
        return TemplateRefusal(why, index)
    why = f"a chat template that ends answer {index}, which others follow, as it ends the last one"
    return TemplateRefusal(f"{why}: {EARLIER}", index)


def left_out(what: str, index: int, message: Message) -> TemplateRefusal:
    """The text does not hold the `what` of a message."""
    expected = f"a chat template that renders the {what} of message {index} as it is"
    if what == "content" and message.role == "system":
        return TemplateRefusal(f"{expected}; this one leaves it out: put its words into the first question", index)
    if what == "content" and holds_thought(message):
        return TemplateRefusal(f"{expected}; this one takes the thought out of it: {_REASONING}", index)
    return TemplateRefusal(expected, index)


def reasoning_left_out(index: int, *, earlier: bool) -> TemplateRefusal:
    expected = f"a chat template that renders the reasoning of message {index}; this one leaves it out"
    cure = f"(there are templates that keep it only after the last question): {EARLIER}" if earlier else f": {ANOTHER}"
    return TemplateRefusal(f"{expected} {cure}" if earlier else f"{expected}{cure}", index)


def call_left_out(index: int) -> TemplateRefusal:
    return TemplateRefusal(
        f"a chat template that renders the tool calls of message {index} with their arguments", index
    )


def not_marked(index: int) -> TemplateRefusal:
    return TemplateRefusal(
        f"a chat template whose {{% generation %}} marks answer {index}, and nothing else with it: {ANOTHER}", index
    )


def holds_thought(message: Message) -> bool:
    return message.role == "assistant" and any(end in message.content for end in _THOUGHT_ENDS)


def _shown(text: str) -> str:
    return repr(text[:_SHOWN_LENGTH_MAX] + ("..." if len(text) > _SHOWN_LENGTH_MAX else ""))

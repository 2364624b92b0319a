"""What a chat template may take notice of in a message and around it, besides the words themselves.

Answers in like surroundings are rendered alike, so one of them stands for all. It renders nothing.
"""

from collections.abc import Hashable, Iterable, Sequence

from formats.rows import Message

Shape = tuple[Hashable, ...]
# Two tool calls, or two messages in a row, are like any more of them.
_SEVERAL = 2


def surroundings(messages: Sequence[Message], sought: Iterable[str]) -> list[Shape]:
    """Of each message: the shapes of itself, of the two before it, of all since the user spoke and of the one before
    that; and whether a question or an answer in words still follows."""
    shapes = [_shape(message, sought) for message in messages]
    last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    last_words = max(
        (index for index, each in enumerate(messages) if each.role == "assistant" and not each.tool_calls), default=-1
    )
    found: list[Shape] = []
    since: set[Shape] = set()
    before: Shape = ()
    questions = turns = 0
    for index, message in enumerate(messages):
        follower = messages[index + 1].role if index + 1 < len(messages) else None
        found.append(
            (
                *shapes[max(0, index - 2) : index + 1],
                frozenset(since),
                before,
                min(questions, _SEVERAL),
                min(turns, _SEVERAL),
                follower,
                index < last_user,
                index < last_words,
            )
        )
        if message.role == "user":
            if index == 0 or messages[index - 1].role != "user":
                before = shapes[index - 1] if index else ()
                since = set()
                questions = 0
                turns += 1
            questions += 1
        since.add(shapes[index])
    return found


def _shape(message: Message, sought: Iterable[str]) -> Shape:
    content = message.content
    core = content.strip()
    begin = len(content) - len(content.lstrip()) if core else len(content)
    words = f"{content}\n{message.reasoning}" if message.reasoning else content
    return (
        message.role,
        bool(core),
        content[:begin],
        content[begin + len(core) :],
        bool(message.reasoning),
        min(len(message.tool_calls), _SEVERAL),
        message.tool_call_id is None,
        message.name is None,
        frozenset(each for each in sought if each in words),
    )

"""The gate that every request passes before its handler: its bytes are the method's message, and a user's text can be
kept. It knows no method.

Here and not in gRPC: that answers a message it cannot read with UNKNOWN and the text of a Python exception.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from chassis.errors import FieldViolation, InvalidArgument
from chassis.storable import UNSTORABLE_TEXT, is_storable

# As generated code registers it; None for a handler that takes bytes, which are then the gate's of the next hop.
Read = Callable[[bytes], Any] | None


def admit(read: Read, content: bytes, *, from_user: bool) -> Any:
    """The message; InvalidArgument for what is none, and for text that cannot be kept where a user sent it.

    Services tell one another what came from elsewhere, such as the last words of a process, and what cannot be kept of
    that is replaced where it is stored (`chassis.db.text`).
    """
    if read is None:
        return content
    try:
        message = read(content)
    except DecodeError as error:
        raise InvalidArgument(
            "INVALID_FIELD", "the bytes are no message of this method, or hold text that is no UTF-8; see its contract"
        ) from error
    # A text with a NUL is a NUL among the bytes; nearly every message has none and is done here.
    if from_user and b"\0" in content and isinstance(message, Message):
        _refuse_unstorable(message)
    return message


async def admit_each(read: Read, contents: Any, *, from_user: bool) -> AsyncIterator[Any]:
    """As `admit`, of a stream."""
    async for content in contents:
        yield admit(read, content, from_user=from_user)


def _refuse_unstorable(message: Message) -> None:
    violations = [FieldViolation(path, UNSTORABLE_TEXT) for path in _unstorable(message)]
    if violations:
        raise InvalidArgument("INVALID_FIELD", f"{violations[0].field} {UNSTORABLE_TEXT}", violations=violations)


def _unstorable(message: Message, prefix: str = "") -> Iterator[str]:
    """Paths such as `spec.notes[2]`. Protobuf bounds how deeply messages nest."""
    for field, value in message.ListFields():
        path = prefix + field.name
        if _is_map(field):
            yield from _unstorable_in_map(field, value, path)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for place, each in _numbered(field, value, path):
                yield from _unstorable(each, f"{place}.")
        elif field.type == FieldDescriptor.TYPE_STRING:
            yield from (place for place, each in _numbered(field, value, path) if not is_storable(each))


def _unstorable_in_map(field: FieldDescriptor, value: Any, path: str) -> Iterator[str]:
    for key, each in value.items():
        place = f"{path}[{key!a}]"
        if (isinstance(key, str) and not is_storable(key)) or (isinstance(each, str) and not is_storable(each)):
            yield place
        elif isinstance(each, Message):
            yield from _unstorable(each, f"{place}.")


def _numbered(field: FieldDescriptor, value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if field.is_repeated:
        yield from ((f"{path}[{index}]", each) for index, each in enumerate(value))
    else:
        yield path, value


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)

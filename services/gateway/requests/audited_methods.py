"""Which public methods are recorded, and what their messages call the resource. Pure: it goes by names alone.

A method changes something unless its name says that it reads, so that a new one is recorded without being listed.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message

from chassis.names import NAME_CHARS_MAX

# What a name begins with that only reads. Quotes, previews and estimates are answered and kept for nobody; what a
# generation changes is its caller's usage, which billing records line by line.
READING = (
    "Chat",
    "Complete",
    "Download",
    "Estimate",
    "Export",
    "Get",
    "List",
    "Preview",
    "Query",
    "Quote",
    "Render",
    "StreamChat",
    "StreamComplete",
    "Verify",
    "Watch",
)
# Fields that say what a request is about, the most exact first; `header` is the first message of a stream.
_NAMING = ("name", "model_id", "parent", "organization", "event_id")
_HEADER = "header"


def asks_for_change(method: str) -> bool:
    """`method` ends in the method's own name; names are words in capitals, so that `Getaway` is none that reads."""
    name = method.rpartition("/")[2]
    return not any(name.startswith(verb) and not name[len(verb) :][:1].islower() for verb in READING)


def resource_of_request(method: MethodDescriptor, content: bytes) -> str:
    """Empty where the request names nothing, or is no message at all."""
    request = _message(method.input_type, content)
    return "" if request is None else _first(_names_in(request))


def resource_of_response(method: MethodDescriptor, response: Any, requested: str) -> str:
    """The name of what the response shows, such as a job that was created; otherwise what was requested.

    A handler answers with a message, a proxy with its bytes.
    """
    answer = _message(method.output_type, response) if isinstance(response, bytes) else response
    if not isinstance(answer, Message):
        return requested
    shown = (value for _, value in answer.ListFields() if isinstance(value, Message))
    return _first(_texts(shown, ("name",))) or requested


def _names_in(request: Message) -> Iterator[str]:
    yield from _texts([request], _NAMING)
    if _HEADER in request.DESCRIPTOR.fields_by_name:
        yield from _names_in(getattr(request, _HEADER))


def _texts(messages: Iterable[Message], fields: Sequence[str]) -> Iterator[str]:
    for message in messages:
        for field in fields:
            found = message.DESCRIPTOR.fields_by_name.get(field)
            if found is not None and found.type == FieldDescriptor.TYPE_STRING and not found.is_repeated:
                yield getattr(message, field)


def _first(names: Iterator[str]) -> str:
    """Cut, because a request may hold megabytes: no resource has a longer name."""
    return next((name for name in names if name), "")[:NAME_CHARS_MAX]


def _message(descriptor: Descriptor, content: bytes) -> Message | None:
    try:
        return message_factory.GetMessageClass(descriptor).FromString(content)
    except DecodeError:
        return None

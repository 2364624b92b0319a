"""Where an event message belongs on the bus, read from the message's own `subject` option.

It knows no event by name.
"""

from google.protobuf.message import Message

from finemesh.common.v1 import event_options_pb2


def subject_of(message: Message | type[Message]) -> str:
    """`tuning.job.state_changed` for a message that declares it; ValueError for one that is not an event."""
    subject: str = message.DESCRIPTOR.GetOptions().Extensions[event_options_pb2.subject]
    if not subject:
        raise ValueError(f"{message.DESCRIPTOR.full_name} declares no (finemesh.common.v1.subject)")
    stream_of(subject)  # a subject without a stream must fail here, where it is declared, not in a relay
    return subject


def family_of(subject: str) -> str:
    """What the subjects of one stream begin with: `tuning.job.state_changed` -> `tuning`."""
    return subject.partition(".")[0]


def stream_of(subject: str) -> str:
    """The stream is the subject's first token in capitals: `tuning.job.state_changed` -> `TUNING`."""
    family, separator, rest = subject.partition(".")
    if not family.isidentifier() or not separator or not rest:
        raise ValueError(f"subject {subject!r} is not <family>.<name>")
    return family.upper()

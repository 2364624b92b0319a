"""What a file of the archive looks like: gzip of JSON lines, the first of which describes the others.

Anybody can read one with `zcat` and a JSON parser. It knows no store and no kind of event. A file holds events of one
stream that the bus took on one day (UTC), each whole: payload, headers, and its place in the stream.
"""

import base64
import gzip
import hashlib
import io
import json
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

FORMAT = "finemesh.usage-archive.v1"
# The digest that stands for the file before the first one.
GENESIS = bytes(32)
PREFIX = "archive/usage"


class ArchiveUnreadable(ValueError):
    """The bytes are not a file of the archive."""


@dataclass(frozen=True, kw_only=True)
class ArchivedEvent:
    """An event as the bus held it. `time` is when the bus took it, `sequence` its place in the stream."""

    stream: str
    sequence: int
    time: datetime
    subject: str
    headers: Mapping[str, str]
    payload: bytes

    @property
    def id(self) -> uuid.UUID | None:
        """None where the headers do not say it: such an event cannot be booked."""
        try:
            return uuid.UUID(self.headers.get("ce-id", ""))
        except ValueError:
            return None

    @property
    def type(self) -> str:
        return self.headers.get("ce-type", "")


@dataclass(frozen=True, kw_only=True)
class FileHeader:
    """The first line. `previous_sha256` (hex) is of the whole file before this one: so the files are a chain."""

    format: str
    position: int
    previous_sha256: str
    stream: str
    event_count: int
    first_time: str
    last_time: str


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """A file ready to be stored."""

    key: str
    header: FileHeader
    content: bytes
    sha256: bytes


def pack(events: Sequence[ArchivedEvent], *, position: int, previous_sha256: bytes) -> PackedFile:
    """The same events at the same place of the chain give the same bytes."""
    first, last = min(event.time for event in events), max(event.time for event in events)
    header = FileHeader(
        format=FORMAT,
        position=position,
        previous_sha256=previous_sha256.hex(),
        stream=events[0].stream,
        event_count=len(events),
        first_time=first.isoformat(),
        last_time=last.isoformat(),
    )
    lines = [json.dumps(asdict(header)), *(json.dumps(_to_line(event)) for event in events)]
    content = gzip.compress("\n".join([*lines, ""]).encode(), compresslevel=6, mtime=0)
    digest = hashlib.sha256(content).digest()
    day = first.astimezone(UTC).date().isoformat()
    # The digest keeps two processes that write for the same place from overwriting each other's file.
    key = f"{PREFIX}/{day}/{position:012d}-{digest.hex()[:16]}.jsonl.gz"
    return PackedFile(key=key, header=header, content=content, sha256=digest)


def unpack(content: bytes, *, unpacked_bytes_max: int) -> tuple[FileHeader, list[ArchivedEvent]]:
    """ArchiveUnreadable for bytes of another kind, and for a file that would unpack to more than the limit."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
            text = packed.read(unpacked_bytes_max + 1)
        if len(text) > unpacked_bytes_max:
            raise ArchiveUnreadable(f"unpacks to more than {unpacked_bytes_max} bytes")
        first, *rest = text.decode().splitlines()
        header = FileHeader(**json.loads(first))
        events = [_from_line(json.loads(line)) for line in rest]
    except ArchiveUnreadable:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise ArchiveUnreadable("it is no gzip, or was cut off") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ArchiveUnreadable("its lines are no events of an archive") from error
    if header.format != FORMAT:
        raise ArchiveUnreadable(f"its format is {header.format!r}, not {FORMAT}")
    if header.event_count != len(events):
        raise ArchiveUnreadable(f"has {len(events)} events, its first line says {header.event_count}")
    return header, events


def _to_line(event: ArchivedEvent) -> dict[str, object]:
    payload = base64.b64encode(event.payload).decode()
    return asdict(event) | {"time": event.time.isoformat(), "headers": dict(event.headers), "payload": payload}


def _from_line(line: Mapping[str, object]) -> ArchivedEvent:
    headers, payload, sequence = line["headers"], line["payload"], line["sequence"]
    if not isinstance(headers, dict) or not isinstance(payload, str) or not isinstance(sequence, int):
        raise ArchiveUnreadable("a line is not an event")
    if not all(isinstance(each, str) for each in headers.values()):
        raise ArchiveUnreadable("the headers of a line are no texts")
    return ArchivedEvent(
        stream=str(line["stream"]),
        sequence=sequence,
        time=datetime.fromisoformat(str(line["time"])),
        subject=str(line["subject"]),
        headers=headers,
        payload=base64.b64decode(payload, validate=True),
    )

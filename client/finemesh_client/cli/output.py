"""How answers look: JSON for scripts, tables for people. It knows the messages' fields, not their rules."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table
from rich.text import Text

# What a server, a file or a user said is printed as it is: brackets are no markup and `:x:` is no picture. Style is a
# Text.
console = Console(highlight=False, markup=False, emoji=False)
progress_console = Console(stderr=True, highlight=False, markup=False, emoji=False)

STATE_STYLE = {
    "SUCCEEDED": "green",
    "READY": "green",
    "FAILED": "red",
    "INVALID": "red",
    "CANCELLED": "yellow",
    "CANCELLING": "yellow",
    "PARKED": "yellow",
    "RUNNING": "cyan",
    "SUFFICIENT": "green",
    "LOW": "yellow",
    "EXHAUSTED": "red",
}


def as_dict(message: Message) -> dict[str, Any]:
    """A message as JSON with the contract's own field names and every default."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def print_json(value: Message | Sequence[Message] | dict[str, Any]) -> None:
    """One JSON document on stdout."""
    if isinstance(value, Message):
        document: object = as_dict(value)
    elif isinstance(value, dict):
        document = value
    else:
        document = [as_dict(message) for message in value]
    console.print_json(json.dumps(document), indent=None if not console.is_terminal else 2)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """A table on stdout."""
    drawn = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn)


def fields(pairs: Iterable[tuple[str, str | Text]]) -> None:
    """Aligned `name  value` lines; empty values are left out."""
    for name, value in pairs:
        if value:
            console.print(Text.assemble((f"{name:<20}", "bold"), " ", value))


def state(enum_name: str, prefix: str) -> Text:
    """`RUNNING` with its colour from an enum value's name."""
    short = enum_name.removeprefix(prefix)
    return Text(short, style=STATE_STYLE.get(short, ""))


def when(stamp: Timestamp) -> str:
    """Local time of a timestamp, empty when it is not set."""
    if not stamp.seconds:
        return ""
    return datetime.fromtimestamp(stamp.seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def size(count: int) -> str:
    """`1.5 MB` from a number of bytes."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"

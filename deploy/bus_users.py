"""Who may do what on the event bus: one NATS user for each service, with the subjects that it may use. Pure.

`python -m deploy.bus_users` writes deploy/nats/users.conf, which compose mounts; the launcher writes the same with
passwords in it. The readers are those of chassis/bus/durables.py. It knows no message and no server.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from chassis.bus.durables import DURABLES
from chassis.bus.subjects import stream_of

TARGET = Path(__file__).parent / "nats" / "users.conf"
# For people and their tools: all rights, and no service is told its password.
OPERATOR = "operator"

_DEAD_LETTER = "deadletter.event_set_aside"
# A test compares them with the contracts: an event belongs to one service, but for that of a dead letter.
PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "scheduler": (
        "tuning.job.state_changed",
        "tuning.job.ended",
        "node.state_changed",
        "usage.training.recorded",
        _DEAD_LETTER,
    ),
    "billing": (
        "billing.credit.state_changed",
        "billing.spend.threshold_reached",
        "billing.spend.cap_state_changed",
        "billing.hold.expired",
        "billing.invoice.closed",
        _DEAD_LETTER,
    ),
    "inference": (
        "model.registered",
        "model.deleted",
        "endpoint.state_changed",
        "usage.inference.recorded",
        "usage.endpoint.minute_recorded",
        _DEAD_LETTER,
    ),
}
SERVICES = tuple(PUBLISHED)
USERS = (*SERVICES, OPERATOR)
# Verification reads what no file of the archive holds yet, with readers of its own that have no name.
_READ_ASIDE: Mapping[str, tuple[str, ...]] = {"billing": ("USAGE", "TUNING")}


@dataclass(frozen=True, kw_only=True)
class Permissions:
    """Subjects, as NATS writes them; what is denied is so whatever is allowed."""

    publish: tuple[str, ...]
    deny: tuple[str, ...]
    subscribe: tuple[str, ...]


def permissions_of(service: str) -> Permissions:
    """Its own events, the streams that it writes or reads, its own readers, and answers to its own requests."""
    streams = sorted({stream_of(subject) for subject in PUBLISHED[service]} | _read_by(service).keys())
    publish, deny = list(PUBLISHED[service]), []
    for stream in streams:
        publish += _upkeep(stream)
        own = _read_by(service).get(stream, ())
        publish += [subject for reader in own for subject in _reading(stream, reader)]
        if stream in _READ_ASIDE.get(service, ()):
            publish += [f"$JS.API.CONSUMER.CREATE.{stream}", f"$JS.API.CONSUMER.MSG.NEXT.{stream}.*"]
            others = [durable.name for durable in DURABLES[stream] if durable.name not in own]
            deny += [f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{other}" for other in others]
    # What every reader has handled is deleted by those who publish.
    publish += [f"$JS.API.STREAM.PURGE.{stream}" for stream in sorted(map(stream_of, PUBLISHED[service]))]
    return Permissions(publish=tuple(dict.fromkeys(publish)), deny=tuple(deny), subscribe=(f"_INBOX.{service}.>",))


def users(password_of: Callable[[str], str]) -> str:
    """The entries of `authorization { users = [...] }`; a password as NATS shall read it, with its quotes."""
    entries = [_user(service, password_of(service), permissions_of(service)) for service in SERVICES]
    entries.append(f'  {{ user: "{OPERATOR}", password: {password_of(OPERATOR)} }}\n')
    return "users = [\n" + "".join(entries) + "]\n"


def password_variable(user: str) -> str:
    """Where compose is told it."""
    return f"FINEMESH_{user.upper()}_NATS_PASSWORD"


def main() -> None:
    head = "# Written by `python -m deploy.bus_users`; a test compares the two. docs/outbox.md says what it means.\n"
    TARGET.write_text(head + users(lambda user: f"${password_variable(user)}"), encoding="utf-8")


def _read_by(service: str) -> dict[str, tuple[str, ...]]:
    """The service's readers of each stream; their names begin with its own."""
    found = {
        stream: tuple(each.name for each in durables if each.name.partition("-")[0] == service)
        for stream, durables in DURABLES.items()
    }
    return {stream: names for stream, names in found.items() if names}


def _upkeep(stream: str) -> list[str]:
    """Whoever writes or reads a stream makes it with all declared readers, gives it its settings, and looks at it."""
    made = [f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.{durable.name}" for durable in DURABLES.get(stream, ())]
    return [
        *(f"$JS.API.STREAM.{verb}.{stream}" for verb in ("INFO", "CREATE", "UPDATE")),
        f"$JS.API.CONSUMER.LIST.{stream}",
        f"$JS.API.CONSUMER.INFO.{stream}.*",
        *made,
    ]


def _reading(stream: str, reader: str) -> list[str]:
    return [f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{reader}", f"$JS.ACK.{stream}.{reader}.>"]


def _user(name: str, password: str, permissions: Permissions) -> str:
    return f"""\
  {{
    user: "{name}", password: {password}
    permissions: {{
      publish: {{ allow: {_listed(permissions.publish)}, deny: {_listed(permissions.deny)} }}
      subscribe: {{ allow: {_listed(permissions.subscribe)} }}
    }}
  }}
"""


def _listed(subjects: tuple[str, ...]) -> str:
    if len(subjects) < 2:
        return json.dumps(subjects)
    return "[\n" + "".join(f"        {json.dumps(subject)}\n" for subject in subjects) + "      ]"


if __name__ == "__main__":
    main()

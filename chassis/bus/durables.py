"""Which durable readers each stream has, so that whoever makes a stream makes its readers, too.

An event may leave its stream only when each of them has it: a reader that is declared here and has not come yet loses
nothing. It knows no message.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

# JetStream hands out no more than so many events of a reader that are not answered yet.
_PENDING_MAX = 1000


@dataclass(frozen=True, kw_only=True)
class Durable:
    """A reader of some subjects of one stream. `ack_wait_s` of None stands for the setting `consumer_ack_wait_s`."""

    name: str
    subjects: tuple[str, ...]
    ack_wait_s: float | None = None
    pending_max: int = _PENDING_MAX


# Archives money before it leaves the stream. It answers many events together, when the file that holds them is stored.
ARCHIVE = "billing-archive"
# What health is asked for: do events wait too long for it?
ARCHIVE_HEALTH = "finemesh.billing.archive"
# Until billing comes, which has settings for both.
ARCHIVE_ACK_WAIT_S = 300.0
ARCHIVE_PENDING_MAX = 20_000


def _archive(*subjects: str) -> Durable:
    return Durable(name=ARCHIVE, subjects=subjects, ack_wait_s=ARCHIVE_ACK_WAIT_S, pending_max=ARCHIVE_PENDING_MAX)


DURABLES: Mapping[str, tuple[Durable, ...]] = MappingProxyType(
    {
        "USAGE": (Durable(name="billing", subjects=("usage.>",)), _archive("usage.>")),
        "TUNING": (
            Durable(name="billing", subjects=("tuning.job.ended",)),
            _archive("tuning.job.ended"),
            Durable(name="inference", subjects=("tuning.job.ended",)),
        ),
        "MODEL": (Durable(name="scheduler", subjects=("model.deleted",)),),
        "BILLING": (
            Durable(name="inference", subjects=("billing.credit.state_changed", "billing.spend.cap_state_changed")),
        ),
    }
)


def find_durable(
    durables: Mapping[str, tuple[Durable, ...]], stream: str, name: str, subjects: Collection[str]
) -> Durable:
    """The declared reader; ValueError where a stream declares its readers, but not this one for these subjects."""
    wanted = Durable(name=name, subjects=tuple(sorted(subjects)))
    if stream not in durables:
        return wanted
    for durable in durables[stream]:
        if durable.name == name and durable.subjects == wanted.subjects:
            return durable
    raise ValueError(f"chassis/bus/durables.py declares no reader {name} of {', '.join(wanted.subjects)} in {stream}")

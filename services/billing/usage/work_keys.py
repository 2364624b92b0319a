"""The names of pieces of work, as whoever reports work derives them.

The same work has the same name, so it is booked once. It knows no event and no table.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from services.billing.usage.records import UsageKind

# A part of a served call is two records, one for each direction; the part's key is theirs without the end.
SIDES: Mapping[UsageKind, str] = MappingProxyType(
    {UsageKind.INPUT_TOKENS: ":input", UsageKind.OUTPUT_TOKENS: ":output"}
)
# What is rented, by the collection that its name is in.
COLLECTIONS: Mapping[UsageKind, str] = MappingProxyType(
    {UsageKind.ENDPOINT_MINUTES: "endpoints", UsageKind.CLUSTER_HOURS: "clusters"}
)
# Which of a call's generated tokens a part of it is.
_SERVED = re.compile(r"[^:]+:(0|[1-9][0-9]*)-(0|[1-9][0-9]*)")
# Lease token, and the number of the minute or hour.
_RENTED = re.compile(r"(?:0|[1-9][0-9]*):(0|[1-9][0-9]*)")


def of_training(kind: UsageKind, job_id: str, start_step: int, end_step: int) -> str:
    """Of a range of steps, or of the evaluation with the number `start_step`."""
    if kind is UsageKind.EVALUATION_TOKENS:
        return f"{job_id}:evaluate:{start_step}"
    return f"{job_id}:train:{start_step}-{end_step}"


def served_tokens(work_key: str) -> int | None:
    """How many generated tokens the part of a call has; None for a key that names a whole call, as old ones do."""
    found = _SERVED.fullmatch(work_key)
    return int(found.group(2)) - int(found.group(1)) if found else None


def rented_number(kind: UsageKind, project_id: str, resource: str, work_key: str) -> int | None:
    """Which minute of an endpoint, or hour of a cluster, of the project it is.

    None when the key is not one of `resource`.
    """
    begin = f"projects/{project_id}/{COLLECTIONS[kind]}/"
    rented_id = resource.removeprefix(begin)
    if not resource.startswith(begin) or not rented_id or "/" in rented_id or not work_key.startswith(f"{rented_id}:"):
        return None
    found = _RENTED.fullmatch(work_key, len(rented_id) + 1)
    return int(found.group(1)) if found else None

"""An allocation: the right of one owner to devices of one node, until it ends or is released. Pure."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class AllocationKind(StrEnum):
    TRAINING = "TRAINING"
    SERVING = "SERVING"


@dataclass(frozen=True, kw_only=True)
class AllocationRecord:
    """A live allocation: the right of one owner to devices of one node."""

    lease_token: int
    owner: str
    kind: AllocationKind
    node: str
    hardware_type: str
    device_indices: tuple[int, ...]
    expires_at: datetime

"""What an endpoint is, as its owner and the reconciler see it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A dedicated endpoint. `lease_token` is that of its devices, None while it holds none."""

    id: str
    project_id: str
    organization_id: str
    endpoint_id: str
    model: str
    hardware_type: str
    gpu_count: int
    state: str
    status_message: str
    lease_token: int | None
    device_indices: tuple[int, ...]
    ready_at: datetime | None
    stopped_at: datetime | None
    created_at: datetime
    billed_minutes: int
    # Where the last billed minute ends.
    paid_until: datetime | None

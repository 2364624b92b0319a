"""What an endpoint is, as its owner and the reconciler see it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from services.inference.endpoints.lifecycle import EndpointState


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
    # The process that holds the devices, where it is reached, and until when by the database's clock; empty with them.
    owner: str
    owner_address: str
    claim_until: datetime | None
    # Devices under this lease token or an older one are not taken up again.
    lease_after: int


def new_endpoint(
    *,
    id: str,
    project_id: str,
    organization_id: str,
    endpoint_id: str,
    model: str,
    hardware_type: str = "",
    gpu_count: int = 1,
    created_at: datetime,
) -> Endpoint:
    """One that waits for its first devices."""
    return Endpoint(
        id=id,
        project_id=project_id,
        organization_id=organization_id,
        endpoint_id=endpoint_id,
        model=model,
        hardware_type=hardware_type,
        gpu_count=gpu_count,
        state=EndpointState.PENDING,
        status_message="",
        lease_token=None,
        device_indices=(),
        ready_at=None,
        stopped_at=None,
        created_at=created_at,
        billed_minutes=0,
        paid_until=None,
        owner="",
        owner_address="",
        claim_until=None,
        lease_after=0,
    )

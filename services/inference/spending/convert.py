"""From billing's events to what is known of credit and caps."""

from __future__ import annotations

from chassis.timestamps import time_from_proto
from finemesh.events.v1 import billing_events_pb2
from services.inference.spending.states import CapState, CreditState


def credit_state_from_proto(event: billing_events_pb2.CreditStateChanged) -> CreditState:
    """What billing says of an organization's credit."""
    return CreditState(organization_id=event.organization_id, state=event.to_state, revision=event.revision)


def cap_state_from_proto(event: billing_events_pb2.SpendCapStateChanged) -> CapState:
    """What billing says of a cap."""
    return CapState(
        project_id=event.project_id,
        api_key_id=event.api_key_id,
        capped=event.capped,
        until_time=time_from_proto(event.until_time),
        cap_nanos_usd=event.cap_nanos_usd,
        revision=event.revision,
    )

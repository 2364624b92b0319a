"""The event of a hold that expired, as a message."""

from datetime import datetime

from chassis.timestamps import time_to_proto
from finemesh.events.v1 import billing_events_pb2
from services.billing.holds.hold import Hold


def expired_hold_to_proto(hold: Hold, now: datetime) -> billing_events_pb2.HoldExpired:
    return billing_events_pb2.HoldExpired(
        resource=hold.resource,
        project_id=hold.project_id,
        organization_id=hold.organization_id,
        released_nanos_usd=hold.held_nanos_usd,
        event_time=time_to_proto(now),
    )

"""From endpoints to the events that other services hear, and the names that they go by."""

from __future__ import annotations

from datetime import datetime

from chassis.names import format_name
from chassis.timestamps import time_to_proto
from finemesh.endpoints.v1 import endpoint_pb2
from finemesh.events.v1 import endpoint_events_pb2, usage_events_pb2
from services.inference.endpoints.domain import Endpoint


def endpoint_name(endpoint: Endpoint) -> str:
    """`projects/{project}/endpoints/{endpoint}`."""
    return format_name(endpoint_pb2.Endpoint, project=endpoint.project_id, endpoint=endpoint.id)


def lease_key(endpoint: Endpoint) -> str:
    """An endpoint under its present lease; each lease has an engine and minutes of its own."""
    return f"{endpoint.id}:{endpoint.lease_token}"


def endpoint_state_to_proto(
    endpoint: Endpoint, from_state: str, now: datetime
) -> endpoint_events_pb2.EndpointStateChanged:
    """What other services hear of an endpoint."""
    return endpoint_events_pb2.EndpointStateChanged(
        endpoint=endpoint_name(endpoint),
        project_id=endpoint.project_id,
        from_state=from_state,
        to_state=endpoint.state,
        event_time=time_to_proto(now),
    )


def endpoint_minute_to_proto(
    endpoint: Endpoint, minute: int, started_at: datetime
) -> usage_events_pb2.EndpointMinuteRecorded:
    """One begun minute; the key follows from endpoint, lease and minute."""
    return usage_events_pb2.EndpointMinuteRecorded(
        work_key=f"{lease_key(endpoint)}:{minute}",
        endpoint=endpoint_name(endpoint),
        project_id=endpoint.project_id,
        organization_id=endpoint.organization_id,
        hardware_type=endpoint.hardware_type,
        device_count=endpoint.gpu_count,
        minute=minute,
        usage_time=time_to_proto(started_at),
    )

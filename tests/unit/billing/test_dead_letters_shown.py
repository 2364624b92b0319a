"""What a person sees of an event that was set aside, whatever it claims."""

import json
import uuid
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from chassis.bus.dead_letters import DeadLetter
from finemesh.events.v1 import usage_events_pb2
from services.billing.api.convert import dead_letter_to_proto

LETTER = DeadLetter(
    event_id=uuid.UUID(int=1),
    subject="usage.endpoint.minute_recorded",
    payload=b"",
    headers={},
    reason="EVENT_INVALID",
    error="x",
    failures=1,
    create_time=datetime(2026, 1, 1, tzinfo=UTC),
)


def test_a_moment_that_json_cannot_hold_hides_neither_the_event_nor_the_list() -> None:
    event = usage_events_pb2.EndpointMinuteRecorded(project_id="p1", usage_time=Timestamp(seconds=2**62))
    shown = dead_letter_to_proto(LETTER, event, json_bytes_max=10_000).event_json
    assert "p1" in json.loads(shown)
    assert str(2**62) in json.loads(shown)

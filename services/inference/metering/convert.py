"""From the use of calls to the event that billing hears."""

from __future__ import annotations

from collections.abc import Sequence

from chassis.timestamps import time_to_proto
from finemesh.events.v1 import usage_events_pb2
from services.inference.metering.domain import UsagePart


def parts_to_proto(parts: Sequence[UsagePart]) -> usage_events_pb2.InferenceUsageRecorded:
    """Parts of many calls in one event."""
    records = [
        usage_events_pb2.InferenceUsage(
            work_key=part.work_key,
            project_id=part.call.project_id,
            organization_id=part.call.organization_id,
            model_id=part.call.model_id,
            base_model=part.call.base_model,
            input_tokens=part.input_tokens,
            output_tokens=part.end - part.start,
            usage_time=time_to_proto(part.used_at),
            api_key_id=part.call.api_key_id,
            credit_lease_id=part.call.credit_lease_id,
        )
        for part in parts
    ]
    return usage_events_pb2.InferenceUsageRecorded(records=records)

"""From the usage of calls to the event that billing hears."""

from __future__ import annotations

from collections.abc import Sequence

from chassis.timestamps import time_to_proto
from finemesh.events.v1 import usage_events_pb2
from services.inference.metering.domain import UsageOfCall


def usages_to_proto(usages: Sequence[UsageOfCall]) -> usage_events_pb2.InferenceUsageRecorded:
    """Many calls in one event."""
    records = [
        usage_events_pb2.InferenceUsage(
            work_key=usage.generation_id,
            project_id=usage.project_id,
            organization_id=usage.organization_id,
            model_id=usage.model_id,
            base_model=usage.base_model,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            usage_time=time_to_proto(usage.ended_at),
            api_key_id=usage.api_key_id,
        )
        for usage in usages
    ]
    return usage_events_pb2.InferenceUsageRecorded(records=records)

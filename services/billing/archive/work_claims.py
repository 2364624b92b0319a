"""What an archived event claims: pieces of work, by the names under which they are booked. Not pure: protobuf.

It reads events and says nothing of whether a claim is true or booked. What cannot be read claims nothing.
"""

from collections.abc import Iterator
from typing import NamedTuple

from google.protobuf.message import DecodeError, Message

from chassis.errors import DomainError
from finemesh.events.v1 import tuning_events_pb2, usage_events_pb2
from services.billing.usage.bounds import FactInvalid
from services.billing.usage.convert import (
    cluster_fact_from_proto,
    endpoint_fact_from_proto,
    inference_fact_from_proto,
    job_ending_from_proto,
    training_fact_from_proto,
)
from services.billing.usage.records import Fact, UsageKind
from services.billing.usage.work_keys import SIDES

# Of a job's end, which is booked under the job's name.
JOB_ENDING = "job_ending"

_CLASSES: dict[str, type[Message]] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        usage_events_pb2.TrainingUsageRecorded,
        usage_events_pb2.InferenceUsageRecorded,
        usage_events_pb2.EndpointMinuteRecorded,
        usage_events_pb2.ClusterHourRecorded,
        tuning_events_pb2.TuningJobEnded,
    )
}


class Claim(NamedTuple):
    """One piece of work of one project. `model` is empty where the event does not say it."""

    organization_id: str
    project_id: str
    work_key: str
    kind: str
    resource: str
    model: str
    quantity: int


def read_claims(event_type: str, payload: bytes) -> list[Claim]:
    """Of one event; nothing for a type that billing does not book."""
    kind = _CLASSES.get(event_type)
    if kind is None:
        return []
    try:
        message = kind.FromString(payload)
    except DecodeError:
        return []
    if isinstance(message, usage_events_pb2.InferenceUsageRecorded):
        return [claim for record in message.records for claim in _readable(record)]
    return list(_readable(message))


def _readable(message: Message) -> Iterator[Claim]:
    try:
        yield from _claims(message)
    except (FactInvalid, DomainError):
        return


def _claims(message: Message) -> Iterator[Claim]:
    if isinstance(message, usage_events_pb2.TrainingUsageRecorded):
        trained, _ = training_fact_from_proto(message)
        yield _claim(trained, trained.kind, "", trained.tokens)
    elif isinstance(message, usage_events_pb2.InferenceUsage):
        call = inference_fact_from_proto(message)
        sides = {UsageKind.INPUT_TOKENS: call.input_tokens, UsageKind.OUTPUT_TOKENS: call.output_tokens}
        for kind, tokens in sides.items():
            # A direction without tokens has no record.
            if tokens:
                yield _claim(call, kind, call.base_model, tokens)
    elif isinstance(message, usage_events_pb2.EndpointMinuteRecorded):
        minute = endpoint_fact_from_proto(message)
        yield _claim(minute, UsageKind.ENDPOINT_MINUTES, minute.hardware_type, minute.device_count)
    elif isinstance(message, usage_events_pb2.ClusterHourRecorded):
        hour = cluster_fact_from_proto(message)
        yield _claim(hour, UsageKind.CLUSTER_HOURS, hour.hardware_type, hour.node_count)
    elif isinstance(message, tuning_events_pb2.TuningJobEnded):
        end = job_ending_from_proto(message)
        yield Claim(
            organization_id=end.organization_id,
            project_id=end.project_id,
            work_key=end.resource,
            kind=JOB_ENDING,
            resource=end.resource,
            model=end.ending,
            quantity=end.usage_record_count,
        )


def _claim(fact: Fact, kind: UsageKind, model: str, quantity: int) -> Claim:
    return Claim(
        organization_id=fact.organization_id,
        project_id=fact.project_id,
        work_key=fact.work_key + SIDES.get(kind, ""),
        kind=kind,
        resource=fact.resource,
        model=model,
        quantity=quantity,
    )

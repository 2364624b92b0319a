"""Between nodes and the messages about them: registrations, heartbeats, assignments, events. It calls nobody."""

from datetime import datetime

from chassis.errors import FieldViolation, InvalidArgument
from chassis.timestamps import time_to_proto
from finemesh.events.v1 import node_events_pb2
from finemesh.nodes.v1 import node_pb2, node_service_pb2
from services.scheduler.attempts.convert import checkpoint_key_prefix, model_key_prefix
from services.scheduler.jobs.convert import job_name
from services.scheduler.nodes.node import AssignmentRecord, Beat, DeviceFacts, NodeRegistration

REASON_CHARS_MAX = 500
# Where the processes of a gang meet, on its leading node.
GANG_PORT_MIN = 29_400
GANG_PORT_COUNT = 600


def registration_from_proto(message: node_service_pb2.RegisterNodeRequest, devices_max: int) -> NodeRegistration:
    problems = [
        FieldViolation(field, "is missing")
        for field in ("node", "incarnation", "address")
        if not getattr(message, field)
    ]
    if not 1 <= len(message.devices) <= devices_max:
        problems.append(FieldViolation("devices", f"must be 1 to {devices_max}; got {len(message.devices)}"))
    if len({device.index for device in message.devices}) != len(message.devices):
        problems.append(FieldViolation("devices", "must have different indices"))
    problems += [
        FieldViolation(f"devices[{at}]", "needs an index of 0 or more and a hardware_type")
        for at, device in enumerate(message.devices)
        if device.index < 0 or not device.hardware_type
    ]
    if problems:
        raise InvalidArgument("INVALID_FIELD", "the registration is not complete", violations=problems)
    return NodeRegistration(
        node=message.node,
        incarnation=message.incarnation,
        address=message.address,
        agent_version=message.agent_version,
        preparation_version=message.preparation_version,
        devices=tuple(
            DeviceFacts(
                index=device.index,
                hardware_type=device.hardware_type,
                memory_bytes=device.memory_bytes,
                uuid=device.uuid,
                set_aside_reason=device.set_aside_reason[:REASON_CHARS_MAX],
            )
            for device in message.devices
        ),
    )


def beat_from_proto(message: node_service_pb2.HeartbeatRequest) -> Beat:
    return Beat(node=message.node, incarnation=message.incarnation, lease_tokens=tuple(message.lease_tokens))


def assignment_to_proto(record: AssignmentRecord) -> node_pb2.Assignment:
    message = node_pb2.Assignment(
        lease=node_pb2.Lease(
            token=record.lease_token,
            tuning_job=job_name(record),
            attempt=record.attempt,
            expire_time=time_to_proto(record.expires_at),
        ),
        desired_state=node_pb2.DESIRED_STATE_CANCEL if record.cancelled else node_pb2.DESIRED_STATE_RUN,
        base_revision=record.base_revision,
        device_indices=record.device_indices,
        checkpoint_key_prefix=checkpoint_key_prefix(record),
        model_key_prefix=model_key_prefix(record),
    )
    message.spec.MergeFromString(record.spec)
    message.base_model.MergeFromString(record.base_artifact)
    message.training_file.MergeFromString(record.training_artifact)
    if record.validation_artifact is not None:
        message.validation_file.MergeFromString(record.validation_artifact)
    if record.counts is not None:
        message.counts.MergeFromString(record.counts)
    if record.node_count > 1:
        message.gang.CopyFrom(_gang_part_to_proto(record))
    if record.start_weights is not None:
        message.start_from.MergeFromString(record.start_weights)
    if record.resume_step is not None and record.resume_artifact is not None:
        message.resume_from.step = record.resume_step
        message.resume_from.manifest_sha256 = record.resume_manifest_sha256 or ""
        message.resume_from.artifact.MergeFromString(record.resume_artifact)
    return message


def _gang_part_to_proto(record: AssignmentRecord) -> node_pb2.GangPart:
    """The port follows from the token, so that all nodes agree. One that is taken fails the attempt; the next attempt
    has another."""
    host = record.leading_address.rpartition(":")[0]
    return node_pb2.GangPart(
        node_count=record.node_count,
        leads=record.lease_token == record.attempt_token,
        endpoint=f"{host}:{GANG_PORT_MIN + record.attempt_token % GANG_PORT_COUNT}",
        id=f"{record.job_id}-{record.attempt_token}",
        address=record.address.rpartition(":")[0],
    )


def node_state_to_proto(node: str, state: str, now: datetime) -> node_events_pb2.NodeStateChanged:
    return node_events_pb2.NodeStateChanged(node=node, to_state=state, event_time=time_to_proto(now))

"""Between an attempt and the messages about it: what it reports, where it may store files, what its work costs."""

from datetime import datetime

from chassis.errors import invalid
from chassis.timestamps import time_to_proto
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.events.v1 import usage_events_pb2
from finemesh.nodes.v1 import node_pb2, node_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.attempts.attempt import BadCheckpoint, ExportedModel, NewCheckpoint, Usage
from services.scheduler.attempts.progress import Metric
from services.scheduler.jobs.convert import encoded, folder_key_prefix, job_name
from services.scheduler.jobs.job import JobRef, LeaseRef


def checkpoint_key_prefix(ref: JobRef) -> str:
    return f"{folder_key_prefix(ref)}checkpoints/"


def model_key_prefix(ref: JobRef) -> str:
    return f"{folder_key_prefix(ref)}models/"


def metric_from_proto(message: tuning_job_pb2.TuningProgress) -> Metric:
    validation_loss = None
    if message.HasField("validation_loss"):
        validation_loss = message.validation_loss
    elif message.HasField("initial_validation_loss"):
        validation_loss = message.initial_validation_loss
    return Metric(
        step=message.step,
        step_count=message.step_count,
        training_loss=message.training_loss,
        validation_loss=validation_loss,
        remaining_s=message.remaining_s if message.HasField("remaining_s") else None,
        encoded=encoded(message),
        rewards=(message.reward_accuracy, message.reward_margin) if message.HasField("reward_accuracy") else None,
    )


def usage_from_proto(message: node_service_pb2.TrainingUsage, index: int) -> Usage:
    problem = ""
    if message.kind not in ("train", "evaluate"):
        problem = f"kind must be `train` or `evaluate`; got {message.kind[:40]!r}"
    elif message.tokens < 0 or message.start_step < 0 or message.end_step < message.start_step:
        problem = "tokens and steps must not be negative, and end_step not be before start_step"
    elif (message.kind == "train") != (message.end_step > message.start_step):
        problem = "a train range must hold a step, and an evaluation none"
    if problem:
        field = f"usage[{index}]"
        raise invalid(field, problem, message=f"{field}: {problem}")
    return Usage(kind=message.kind, start_step=message.start_step, end_step=message.end_step, tokens=message.tokens)


def usage_to_proto(
    ref: JobRef, organization_id: str, usage: Usage, now: datetime
) -> usage_events_pb2.TrainingUsageRecorded:
    return usage_events_pb2.TrainingUsageRecorded(
        work_key=usage.work_key(ref.job_id),
        tuning_job=job_name(ref),
        project_id=ref.project_id,
        organization_id=organization_id,
        kind=usage.kind,
        start_step=usage.start_step,
        end_step=usage.end_step,
        tokens=usage.tokens,
        usage_time=time_to_proto(now),
    )


def checkpoint_from_proto(message: node_pb2.CheckpointManifest, ref: LeaseRef) -> NewCheckpoint:
    _require_key("checkpoint.artifact.key", message.artifact.key, checkpoint_key_prefix(ref))
    if message.step < 0 or not message.manifest_sha256 or not message.artifact.files:
        raise invalid("checkpoint", "needs a step, a manifest_sha256 and files")
    return NewCheckpoint(
        step=message.step,
        manifest_sha256=message.manifest_sha256,
        size_bytes=_size_bytes(message.artifact),
        artifact=encoded(message.artifact),
        asked=message.asked,
    )


def bad_checkpoint_from_proto(message: node_service_pb2.AttemptFailed) -> BadCheckpoint | None:
    if not message.HasField("bad_checkpoint"):
        return None
    bad = message.bad_checkpoint
    return BadCheckpoint(step=bad.step, manifest_sha256=bad.manifest_sha256)


def model_from_proto(message: node_service_pb2.AttemptSucceeded, ref: LeaseRef) -> ExportedModel:
    if message.kind not in ("adapter", "full"):
        raise invalid("succeeded.kind", f"must be `adapter` or `full`; got {message.kind[:40]!r}")
    if not message.revision or not message.model.files:
        raise invalid("succeeded", "needs a revision and the model's files")
    _require_key("succeeded.model.key", message.model.key, model_key_prefix(ref))
    return ExportedModel(
        revision=message.revision,
        kind=message.kind,
        adapter_rank=message.adapter_rank,
        lineage=dict(message.lineage),
        artifact=encoded(message.model),
        stopped_early=message.stopped_early,
        step=message.step,
    )


def pin_start(stored: bytes | None, commit: str) -> bytes | None:
    """An encoded StartWeights whose repository of the hub is pinned to a commit, so that all attempts start from the
    same weights; None when there is nothing to pin."""
    weights = node_pb2.StartWeights() if stored is None else node_pb2.StartWeights.FromString(stored)
    if not weights.HasField("hub") or weights.hub.revision == commit:
        return None
    weights.hub.revision = commit
    return encoded(weights)


def _require_key(field: str, key: str, prefix: str) -> None:
    """Files of one project never lie, or are deleted, under another one's keys."""
    if not key.startswith(prefix) or ".." in key:
        raise invalid(field, f"must begin with {prefix}")


def _size_bytes(artifact: artifact_pb2.Artifact) -> int:
    return sum(file.size_bytes for file in artifact.files)

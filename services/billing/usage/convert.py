"""What events say of usage, as values. What cannot be read is refused; it decides nothing else."""

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from chassis.names import parse_name
from chassis.timestamps import time_from_proto
from finemesh.events.v1 import tuning_events_pb2, usage_events_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.billing.holds.hold import JobEnding
from services.billing.holds.settlement import Ending
from services.billing.usage.bounds import FactInvalid
from services.billing.usage.records import ClusterFact, EndpointFact, InferenceFact, TrainingFact, UsageKind

_TRAINING_KINDS = {"train": UsageKind.TRAINING_TOKENS, "evaluate": UsageKind.EVALUATION_TOKENS}


_ENDINGS = {
    tuning_events_pb2.TUNING_JOB_ENDING_COMPLETED: Ending.COMPLETED,
    tuning_events_pb2.TUNING_JOB_ENDING_STOPPED_EARLY: Ending.STOPPED_EARLY,
    tuning_events_pb2.TUNING_JOB_ENDING_CANCELLED_RUNNING: Ending.CANCELLED_RUNNING,
    tuning_events_pb2.TUNING_JOB_ENDING_CANCELLED_BEFORE_RUN: Ending.CANCELLED_BEFORE_RUN,
    tuning_events_pb2.TUNING_JOB_ENDING_PLATFORM_FAILURE: Ending.PLATFORM_FAILURE,
    tuning_events_pb2.TUNING_JOB_ENDING_USER_FAILURE: Ending.USER_FAILURE,
    tuning_events_pb2.TUNING_JOB_ENDING_REFUSED: Ending.REFUSED,
}


def training_fact_from_proto(message: usage_events_pb2.TrainingUsageRecorded) -> tuple[TrainingFact, str]:
    """The fact, and the id of its job."""
    job_id = _job_id(message.tuning_job, message.project_id)
    kind = _TRAINING_KINDS.get(message.kind)
    if kind is None:
        raise FactInvalid(f"kind {message.kind!r} is neither train nor evaluate")
    fact = TrainingFact(
        work_key=message.work_key,
        organization_id=message.organization_id,
        project_id=message.project_id,
        resource=message.tuning_job,
        usage_time=_moment("usage_time", message.usage_time),
        kind=kind,
        start_step=message.start_step,
        end_step=message.end_step,
        tokens=message.tokens,
    )
    return fact, job_id


def inference_fact_from_proto(record: usage_events_pb2.InferenceUsage) -> InferenceFact:
    return InferenceFact(
        work_key=record.work_key,
        organization_id=record.organization_id,
        project_id=record.project_id,
        resource=record.model_id,
        usage_time=_moment("usage_time", record.usage_time),
        base_model=record.base_model,
        input_tokens=record.input_tokens,
        output_tokens=record.output_tokens,
        api_key_id=record.api_key_id,
        credit_lease_id=record.credit_lease_id,
    )


def endpoint_fact_from_proto(message: usage_events_pb2.EndpointMinuteRecorded) -> EndpointFact:
    return EndpointFact(
        work_key=message.work_key,
        organization_id=message.organization_id,
        project_id=message.project_id,
        resource=message.endpoint,
        usage_time=_moment("usage_time", message.usage_time),
        hardware_type=message.hardware_type,
        device_count=message.device_count,
        minute=message.minute,
    )


def cluster_fact_from_proto(message: usage_events_pb2.ClusterHourRecorded) -> ClusterFact:
    return ClusterFact(
        work_key=message.work_key,
        organization_id=message.organization_id,
        project_id=message.project_id,
        resource=message.cluster,
        usage_time=_moment("usage_time", message.usage_time),
        hardware_type=message.hardware_type,
        node_count=message.node_count,
        hour=message.hour,
    )


def job_ending_from_proto(message: tuning_events_pb2.TuningJobEnded) -> JobEnding:
    _job_id(message.tuning_job, message.project_id)
    ending = _ENDINGS.get(message.ending)
    if ending is None:
        raise FactInvalid(f"ending {message.ending} is not known")
    if message.usage_record_count < 0:
        raise FactInvalid("usage_record_count must not be negative")
    return JobEnding(
        resource=message.tuning_job,
        organization_id=message.organization_id,
        project_id=message.project_id,
        ending=ending,
        usage_record_count=message.usage_record_count,
        end_time=_moment("end_time", message.end_time),
    )


def _job_id(name: str, project_id: str) -> str:
    parts = parse_name(tuning_job_pb2.TuningJob, name, "tuning_job")
    if parts["project"] != project_id:
        raise FactInvalid(f"{name} is not a job of project {project_id!r}")
    return parts["tuning_job"]


def _moment(name: str, value: Timestamp) -> datetime:
    try:
        return time_from_proto(value)
    except ValueError:
        raise FactInvalid(f"{name} is no moment of this era") from None

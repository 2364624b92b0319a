"""The events of a storm: what three organizations really used, and what cannot be true. It publishes
and kills nothing."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from chassis.bus.subjects import subject_of
from finemesh.events.v1 import tuning_events_pb2, usage_events_pb2

ORGANIZATIONS = ("amber", "birch", "cedar")
JOBS, STEPS, EVALUATIONS = 8, 10, 2
CALL_EVENTS, CALLS = 400, 5
MINUTES = 60
# Job 999 has usage and no hold.
UNHELD = 999
START = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=2)


@dataclass(frozen=True, kw_only=True)
class Event:
    """`why` is a part of the reason for which it cannot be booked, empty when it can."""

    subject: str
    payload: bytes
    headers: dict[str, str]
    why: str = ""

    @property
    def id(self) -> uuid.UUID:
        return uuid.UUID(self.headers["ce-id"])

    def again(self, number: int) -> Event:
        """The same work, reported as another event."""
        return Event(
            subject=self.subject,
            payload=self.payload,
            headers={**self.headers, "ce-id": str(uuid.uuid5(self.id, str(number)))},
            why=self.why,
        )


@dataclass(kw_only=True)
class Storm:
    """All events, and what must be in the ledger afterwards: quantity by project and work key."""

    events: list[Event] = field(default_factory=list)
    booked: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, message: Message, why: str = "") -> None:
        headers = {
            "ce-specversion": "1.0",
            "ce-id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{len(self.events)}")),
            "ce-source": "meter",
            "ce-type": message.DESCRIPTOR.full_name,
            "ce-subject": "storm",
            "ce-time": START.isoformat(),
        }
        event = Event(subject=subject_of(message), payload=message.SerializeToString(), headers=headers, why=why)
        self.events.append(event)


def at(seconds: float) -> Timestamp:
    value = Timestamp()
    value.FromDatetime(START + timedelta(seconds=seconds))
    return value


def job_name(organization: str, number: int) -> str:
    return f"projects/{organization}-p/tuningJobs/ft-{organization}-{number}"


def trained(organization: str, number: int, kind: str, start: int, end: int, tokens: int) -> Message:
    job_id = f"ft-{organization}-{number}"
    key = f"{job_id}:train:{start}-{end}" if kind == "train" else f"{job_id}:evaluate:{start}"
    return usage_events_pb2.TrainingUsageRecorded(
        work_key=key,
        tuning_job=job_name(organization, number),
        project_id=f"{organization}-p",
        organization_id=organization,
        kind=kind,
        start_step=start,
        end_step=end,
        tokens=tokens,
        usage_time=at(end),
    )


def call(organization: str, key: str, input_tokens: int, output_tokens: int) -> usage_events_pb2.InferenceUsage:
    return usage_events_pb2.InferenceUsage(
        work_key=f"{organization}-{key}",
        project_id=f"{organization}-p",
        organization_id=organization,
        model_id="acme/bot",
        base_model="finemesh/demo-llama",
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        usage_time=at(input_tokens),
    )


def minute(organization: str, number: int, hardware: str = "cpu") -> Message:
    return usage_events_pb2.EndpointMinuteRecorded(
        work_key=f"ep-{organization}:7:{number}",
        endpoint=f"projects/{organization}-p/endpoints/ep-{organization}",
        project_id=f"{organization}-p",
        organization_id=organization,
        hardware_type=hardware,
        device_count=2,
        minute=number,
        usage_time=at(60 * number),
    )


def gather(storm: Storm, organization: str) -> None:
    """What an organization really used."""
    project = f"{organization}-p"
    for number in range(JOBS):
        for step in range(STEPS):
            storm.add(trained(organization, number, "train", step * 10, step * 10 + 10, 200))
            storm.booked[project, f"ft-{organization}-{number}:train:{step * 10}-{step * 10 + 10}"] = 200
        for evaluation in range(1, EVALUATIONS + 1):
            storm.add(trained(organization, number, "evaluate", evaluation, evaluation, 100))
            storm.booked[project, f"ft-{organization}-{number}:evaluate:{evaluation}"] = 100
        storm.add(
            tuning_events_pb2.TuningJobEnded(
                tuning_job=job_name(organization, number),
                project_id=project,
                organization_id=organization,
                ending=tuning_events_pb2.TUNING_JOB_ENDING_COMPLETED,
                usage_record_count=STEPS + EVALUATIONS,
                end_time=at(200),
            )
        )
    for batch in range(CALL_EVENTS):
        calls = [call(organization, f"gen-{batch}-{place}", 100 + place, 10) for place in range(CALLS)]
        for one in calls:
            storm.booked[project, f"{one.work_key}:input"] = one.input_tokens
            storm.booked[project, f"{one.work_key}:output"] = one.output_tokens
        storm.add(usage_events_pb2.InferenceUsageRecorded(records=calls))
    for number in range(MINUTES):
        storm.add(minute(organization, number))
        storm.booked[project, f"ep-{organization}:7:{number}"] = 2


def lie(storm: Storm, organization: str) -> None:
    """What cannot be true, each with its reason."""
    storm.add(trained(organization, 0, "train", 1000, 1010, -5), "tokens must be from 0")
    storm.add(trained(organization, 0, "dream", 1000, 1010, 5), "neither train nor evaluate")
    storm.add(trained(organization, UNHELD, "train", 0, 10, 200), "has no hold")
    storm.add(minute(organization, 70, hardware="abacus"), "no price for hardware")
    storm.add(minute(organization, -1), "minute must be from 0")
    # One good call among bad ones is booked; the others stay together.
    storm.booked[f"{organization}-p", f"{organization}-gen-good:input"] = 7
    records = [
        call(organization, "gen-good", 7, 0),
        call(organization, "gen-bad-1", -7, 0),
        call(organization, "gen-bad-2", 7, -1),
    ]
    storm.add(usage_events_pb2.InferenceUsageRecorded(records=records), "2 of 3 calls")


def make_storm() -> Storm:
    storm = Storm()
    for organization in ORGANIZATIONS:
        gather(storm, organization)
        lie(storm, organization)
    garbage = storm.events[0]
    storm.events.append(
        Event(
            subject=garbage.subject,
            payload=b"\xff\xff",
            headers={**garbage.headers, "ce-id": str(uuid.uuid5(uuid.NAMESPACE_OID, "garbage"))},
            why="Error parsing message",
        )
    )
    return storm

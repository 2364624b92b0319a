"""The bounds within which what an event claims can be true. It prices and books nothing."""

from datetime import UTC, datetime

from chassis.names import PART_CHARS_MAX, is_id
from services.billing.holds.hold import JobEnding
from services.billing.limits import FactLimits
from services.billing.usage import work_keys
from services.billing.usage.records import ClusterFact, EndpointFact, Fact, InferenceFact, TrainingFact, UsageKind

WORK_KEY_CHARS_MAX = 256
NAME_CHARS_MAX = 512
# No meter of this platform ran before it.
EARLIEST = datetime(2020, 1, 1, tzinfo=UTC)


class FactInvalid(ValueError):
    """The claim cannot be true: no later attempt can book it."""


def check_training(fact: TrainingFact, job_id: str, now: datetime, limits: FactLimits) -> None:
    _check(fact, now, limits)
    _within("tokens", fact.tokens, 0, limits.tokens_max)
    _within("start_step", fact.start_step, 0, limits.steps_max)
    _within("end_step", fact.end_step, fact.start_step, limits.steps_max)
    if fact.kind is UsageKind.TRAINING_TOKENS and fact.end_step == fact.start_step:
        raise FactInvalid("a range of training steps has at least one step")
    # Under a key of its own the same work would be booked a second time.
    derived = work_keys.of_training(fact.kind, job_id, fact.start_step, fact.end_step)
    if fact.work_key != derived:
        raise FactInvalid(f"work key {fact.work_key!r} does not follow from its work, which is {derived!r}")


def check_inference(fact: InferenceFact, now: datetime, limits: FactLimits) -> None:
    _check(fact, now, limits)
    _text("base_model", fact.base_model, NAME_CHARS_MAX)
    _within("input_tokens", fact.input_tokens, 0, limits.tokens_max)
    _within("output_tokens", fact.output_tokens, 0, limits.tokens_max)
    if work_keys.served_tokens(fact.work_key) not in (None, fact.output_tokens):
        raise FactInvalid(f"work key {fact.work_key!r} does not name {fact.output_tokens} generated tokens")
    for name, value in (("api_key_id", fact.api_key_id), ("credit_lease_id", fact.credit_lease_id)):
        if len(value) > WORK_KEY_CHARS_MAX or not value.isprintable():
            raise FactInvalid(f"{name} must be at most {WORK_KEY_CHARS_MAX} printable characters")


def check_endpoint(fact: EndpointFact, now: datetime, limits: FactLimits) -> None:
    _check(fact, now, limits)
    _text("hardware_type", fact.hardware_type, NAME_CHARS_MAX)
    _within("device_count", fact.device_count, 1, limits.devices_max)
    _within("minute", fact.minute, 0, limits.steps_max)
    _rented(UsageKind.ENDPOINT_MINUTES, fact, fact.minute)


def check_cluster(fact: ClusterFact, now: datetime, limits: FactLimits) -> None:
    _check(fact, now, limits)
    _text("hardware_type", fact.hardware_type, NAME_CHARS_MAX)
    _within("node_count", fact.node_count, 1, limits.nodes_max)
    _within("hour", fact.hour, 0, limits.steps_max)
    _rented(UsageKind.CLUSTER_HOURS, fact, fact.hour)


def check_ending(ending: JobEnding, now: datetime, limits: FactLimits) -> None:
    _id("organization_id", ending.organization_id)
    _check_time("end_time", ending.end_time, now, limits)


def _check_time(name: str, moment: datetime, now: datetime, limits: FactLimits) -> None:
    if moment < EARLIEST:
        raise FactInvalid(f"{name} {moment.isoformat()} is before {EARLIEST.isoformat()}")
    if moment > now + limits.clock_skew:
        raise FactInvalid(f"{name} {moment.isoformat()} is in the future")


def _check(fact: Fact, now: datetime, limits: FactLimits) -> None:
    _text("work_key", fact.work_key, WORK_KEY_CHARS_MAX)
    _id("organization_id", fact.organization_id)
    _id("project_id", fact.project_id)
    _text("resource", fact.resource, NAME_CHARS_MAX)
    _check_time("usage_time", fact.usage_time, now, limits)


def _rented(kind: UsageKind, fact: Fact, number: int) -> None:
    if work_keys.rented_number(kind, fact.project_id, fact.resource, fact.work_key) != number:
        raise FactInvalid(
            f"work key {fact.work_key!r} is not that of number {number} of {fact.resource} in project {fact.project_id}"
        )


def _text(name: str, value: str, chars_max: int) -> None:
    if not value or len(value) > chars_max or not value.isprintable():
        raise FactInvalid(f"{name} must be 1 to {chars_max} printable characters")


def _id(name: str, value: str) -> None:
    """What invoices and usage records are named after."""
    if not is_id(value):
        raise FactInvalid(
            f"{name} must be 1 to {PART_CHARS_MAX} of the characters A-Z a-z 0-9 . _ -, and not dots alone"
        )


def _within(name: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise FactInvalid(f"{name} must be from {lowest} to {highest}, not {value}")

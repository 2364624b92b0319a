"""Billing's readers of events: check what an event claims, then book it. What cannot be true is set aside with a reason."""

from google.protobuf.message import Message

from chassis.bus.consumer import Handler
from chassis.bus.envelope import EventInfo
from chassis.clock import Clock
from chassis.db.pool import Connection
from finemesh.events.v1 import tuning_events_pb2, usage_events_pb2
from services.billing import booking, convert, facts
from services.billing.facts import FactLimits
from services.billing.pricebook import Shelf
from services.billing.refusal import refusing

DURABLE = "billing"


class Events:
    """Handlers for a Consumer; each runs in the transaction that records the event as handled."""

    def __init__(self, shelf: Shelf, limits: FactLimits, *, clock: Clock) -> None:
        self._shelf = shelf
        self._limits = limits
        self._clock = clock

    @property
    def handlers(self) -> dict[type[Message], Handler]:
        return {
            usage_events_pb2.TrainingUsageRecorded: self.training_usage,
            usage_events_pb2.InferenceUsageRecorded: self.inference_usage,
            usage_events_pb2.EndpointMinuteRecorded: self.endpoint_minute,
            tuning_events_pb2.TuningJobEnded: self.job_ended,
        }

    async def training_usage(
        self, connection: Connection, message: usage_events_pb2.TrainingUsageRecorded, event: EventInfo
    ) -> None:
        with refusing():
            fact, job_id = convert.training_fact(message)
            facts.check_training(fact, job_id, self._clock.now(), self._limits)
            await booking.book_training(connection, self._shelf, fact)

    async def inference_usage(
        self, connection: Connection, message: usage_events_pb2.InferenceUsageRecorded, event: EventInfo
    ) -> None:
        with refusing():
            claims = convert.inference_facts(message)
            facts.check_inference(claims, self._clock.now(), self._limits)
            await booking.book_inference(connection, self._shelf, claims)

    async def endpoint_minute(
        self, connection: Connection, message: usage_events_pb2.EndpointMinuteRecorded, event: EventInfo
    ) -> None:
        with refusing():
            fact = convert.endpoint_fact(message)
            facts.check_endpoint(fact, self._clock.now(), self._limits)
            await booking.book_endpoint_minute(connection, self._shelf, fact)

    async def job_ended(
        self, connection: Connection, message: tuning_events_pb2.TuningJobEnded, event: EventInfo
    ) -> None:
        with refusing():
            ending = convert.job_ending(message)
            facts.check_time("end_time", ending.end_time, self._clock.now(), self._limits)
            await booking.book_ending(connection, self._shelf, ending)

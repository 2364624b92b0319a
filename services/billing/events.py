"""Handlers for the events that report usage and the ends of jobs. Not pure: bus, database, protobuf.

Each checks what an event claims, then has it booked. An event that cannot be true is set aside with a reason.
"""

from datetime import datetime

from google.protobuf.message import Message

from chassis.bus.consumer import Handler
from chassis.bus.dead_letters import set_aside
from chassis.bus.envelope import EventInfo
from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Connection
from chassis.errors import InvalidArgument
from finemesh.events.v1 import tuning_events_pb2, usage_events_pb2
from services.billing.api.errors import typed_errors
from services.billing.budgets.caps import Spender
from services.billing.budgets.review import review_spending
from services.billing.holds.store import HoldStore
from services.billing.limits import FactLimits
from services.billing.prices.catalogue import Catalogue
from services.billing.usage import bounds, capacity, inference, training
from services.billing.usage.bounds import FactInvalid
from services.billing.usage.convert import (
    cluster_fact_from_proto,
    endpoint_fact_from_proto,
    inference_fact_from_proto,
    job_ending_from_proto,
    training_fact_from_proto,
)
from services.billing.usage.records import InferenceFact

DURABLE = "billing"
# Usage of a kind that this version does not know is money, too: it waits among the dead letters for the next version.
FAMILIES = ("usage",)


class Events:
    """Handlers for a Consumer; each runs in the transaction that records the event as handled."""

    def __init__(self, catalogue: Catalogue, limits: FactLimits, outbox: Outbox, *, clock: Clock) -> None:
        self._catalogue = catalogue
        self._limits = limits
        self._outbox = outbox
        self._clock = clock

    @property
    def handlers(self) -> dict[type[Message], Handler]:
        return {
            usage_events_pb2.TrainingUsageRecorded: self.training_usage,
            usage_events_pb2.InferenceUsageRecorded: self.inference_usage,
            usage_events_pb2.EndpointMinuteRecorded: self.endpoint_minute,
            usage_events_pb2.ClusterHourRecorded: self.cluster_hour,
            tuning_events_pb2.TuningJobEnded: self.job_ended,
        }

    async def training_usage(
        self, connection: Connection, message: usage_events_pb2.TrainingUsageRecorded, event: EventInfo
    ) -> None:
        with typed_errors():
            fact, job_id = training_fact_from_proto(message)
            now = self._clock.now()
            bounds.check_training(fact, job_id, now, self._limits)
            settled = await training.book_training(connection, self._catalogue, fact, now)
        if settled:
            await self._review_job(connection, fact.resource, now)

    async def inference_usage(
        self, connection: Connection, message: usage_events_pb2.InferenceUsageRecorded, event: EventInfo
    ) -> None:
        """Books the calls that can be booked; the others are set aside together, as an event of their own."""
        now = self._clock.now()
        claims: list[InferenceFact] = []
        claimed: list[usage_events_pb2.InferenceUsage] = []
        refused: list[tuple[usage_events_pb2.InferenceUsage, str]] = []
        for record in message.records:
            try:
                fact = inference_fact_from_proto(record)
                bounds.check_inference(fact, now, self._limits)
            except FactInvalid as error:
                refused.append((record, str(error)))
            else:
                claims.append(fact)
                claimed.append(record)
        unbooked = await inference.book_inference(connection, self._catalogue, claims, now)
        spenders = {Spender(fact.project_id, fact.api_key_id) for fact in claims}
        organization_ids = {fact.organization_id for fact in claims}
        await review_spending(connection, self._outbox, organization_ids, now, spenders=spenders)
        refused += [(claimed[each.index], each.error) for each in unbooked]
        if not refused:
            return
        first = refused[0][1]
        if len(refused) == len(message.records):
            raise InvalidArgument("EVENT_INVALID", first)
        await set_aside(
            connection,
            consumer=DURABLE,
            event=event,
            message=usage_events_pb2.InferenceUsageRecorded(records=[record for record, _ in refused]),
            reason="EVENT_INVALID",
            outbox=self._outbox,
            error=f"{len(refused)} of {len(message.records)} calls cannot be booked; the first: {first}",
        )

    async def endpoint_minute(
        self, connection: Connection, message: usage_events_pb2.EndpointMinuteRecorded, event: EventInfo
    ) -> None:
        with typed_errors():
            fact = endpoint_fact_from_proto(message)
            now = self._clock.now()
            bounds.check_endpoint(fact, now, self._limits)
            await capacity.book_endpoint_minute(connection, self._catalogue, fact, now)
        spenders = [Spender(fact.project_id)]
        await review_spending(connection, self._outbox, [fact.organization_id], now, spenders=spenders)

    async def cluster_hour(
        self, connection: Connection, message: usage_events_pb2.ClusterHourRecorded, event: EventInfo
    ) -> None:
        with typed_errors():
            fact = cluster_fact_from_proto(message)
            now = self._clock.now()
            bounds.check_cluster(fact, now, self._limits)
            await capacity.book_cluster_hour(connection, self._catalogue, fact, now)
        spenders = [Spender(fact.project_id)]
        await review_spending(connection, self._outbox, [fact.organization_id], now, spenders=spenders)

    async def job_ended(
        self, connection: Connection, message: tuning_events_pb2.TuningJobEnded, event: EventInfo
    ) -> None:
        with typed_errors():
            ending = job_ending_from_proto(message)
            now = self._clock.now()
            bounds.check_ending(ending, now, self._limits)
            settled = await training.book_ending(connection, self._catalogue, ending, now)
        if settled:
            await self._review_job(connection, ending.resource, now)

    async def _review_job(self, connection: Connection, resource: str, now: datetime) -> None:
        hold = await HoldStore(connection).get(resource)
        assert hold is not None, "what was settled was held"
        await review_spending(connection, self._outbox, [hold.organization_id], now, spenders=[hold.spender])

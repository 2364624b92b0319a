"""Billing's readers of events: check what an event claims, then book it. What cannot be true is set aside with a reason."""

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
from services.billing import booking, convert, facts, rented, served, spending, store
from services.billing.caps import Spender
from services.billing.facts import FactInvalid, FactLimits
from services.billing.pricebook import Shelf
from services.billing.refusal import refusing

DURABLE = "billing"
# Usage of a kind that this version does not know is money, too: it waits among the dead letters for the next version.
FAMILIES = ("usage",)


class Events:
    """Handlers for a Consumer; each runs in the transaction that records the event as handled."""

    def __init__(self, shelf: Shelf, limits: FactLimits, outbox: Outbox, *, clock: Clock) -> None:
        self._shelf = shelf
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
        with refusing():
            fact, job_id = convert.training_fact(message)
            now = self._clock.now()
            facts.check_training(fact, job_id, now, self._limits)
            settled = await booking.book_training(connection, self._shelf, fact, now)
        if settled:
            await self._review_job(connection, fact.resource, now)

    async def inference_usage(
        self, connection: Connection, message: usage_events_pb2.InferenceUsageRecorded, event: EventInfo
    ) -> None:
        """Books the calls that can be booked; the others are set aside together, as an event of their own."""
        now = self._clock.now()
        claims: list[facts.InferenceFact] = []
        claimed: list[usage_events_pb2.InferenceUsage] = []
        refused: list[tuple[usage_events_pb2.InferenceUsage, str]] = []
        for record in message.records:
            try:
                fact = convert.inference_fact(record)
                facts.check_inference(fact, now, self._limits)
            except FactInvalid as error:
                refused.append((record, str(error)))
            else:
                claims.append(fact)
                claimed.append(record)
        unbooked = await served.book_inference(connection, self._shelf, claims, now)
        spenders = {Spender(fact.project_id, fact.api_key_id) for fact in claims}
        organization_ids = {fact.organization_id for fact in claims}
        await spending.review(connection, self._outbox, organization_ids, now, spenders=spenders)
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
        with refusing():
            fact = convert.endpoint_fact(message)
            now = self._clock.now()
            facts.check_endpoint(fact, now, self._limits)
            await rented.book_endpoint_minute(connection, self._shelf, fact, now)
        spenders = [Spender(fact.project_id)]
        await spending.review(connection, self._outbox, [fact.organization_id], now, spenders=spenders)

    async def cluster_hour(
        self, connection: Connection, message: usage_events_pb2.ClusterHourRecorded, event: EventInfo
    ) -> None:
        with refusing():
            fact = convert.cluster_fact(message)
            now = self._clock.now()
            facts.check_cluster(fact, now, self._limits)
            await rented.book_cluster_hour(connection, self._shelf, fact, now)
        spenders = [Spender(fact.project_id)]
        await spending.review(connection, self._outbox, [fact.organization_id], now, spenders=spenders)

    async def job_ended(
        self, connection: Connection, message: tuning_events_pb2.TuningJobEnded, event: EventInfo
    ) -> None:
        with refusing():
            ending = convert.job_ending(message)
            now = self._clock.now()
            facts.check_ending(ending, now, self._limits)
            settled = await booking.book_ending(connection, self._shelf, ending, now)
        if settled:
            await self._review_job(connection, ending.resource, now)

    async def _review_job(self, connection: Connection, resource: str, now: datetime) -> None:
        hold = await store.get_hold(connection, resource)
        assert hold is not None, "what was settled was held"
        await spending.review(connection, self._outbox, [hold.organization_id], now, spenders=[hold.spender])

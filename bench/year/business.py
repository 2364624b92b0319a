"""What happens on each virtual day: calls, jobs, minutes of endpoints and leases of credit, the same number every day.

It is written as the services write it, into the outbox of whoever meters; it measures nothing.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from google.protobuf.message import Message

from bench.year.offices import Billing, Meter
from chassis.db.pool import transaction
from chassis.timestamps import time_to_proto
from finemesh.events.v1 import tuning_events_pb2, usage_events_pb2
from services.billing.budgets.caps import Spender
from services.billing.budgets.store import BudgetStore
from services.billing.holds import holding
from services.billing.leasing.credit_lease import Wish
from services.billing.leasing.granting import GrantRequest, grant
from services.billing.leasing.store import LeaseStore, Returned
from services.billing.ledger.top_up import add_credit
from services.billing.prices.pricing import Work

ORGANIZATIONS = 20
MODELS = 4
# Of a day's events, one in so many is a step of a job, and one a minute of an endpoint; for so many there is a lease.
STEPS_EVERY, MINUTES_EVERY, LEASES_EVERY = 20, 20, 100
STEPS_PER_JOB = 10
BASE = "meta-llama/Llama-3.1-8B"
CREDIT_NANOS_USD = 10**17
# Reached in every month, so that states of caps change and warnings go out.
CAP_NANOS_USD = 10**7
# Events of one transaction.
TOGETHER = 10
_WORK = Work(
    base_model=BASE,
    method="sft_lora",
    training_tokens=1000 * STEPS_PER_JOB,
    validation_tokens=0,
    epochs=1,
    evaluations=0,
)


def organization(number: int) -> str:
    return f"org_{number}"


def project(number: int) -> str:
    return f"proj_{number}"


class Business:
    def __init__(self, billing: Billing, meter: Meter, *, calls: int) -> None:
        self._billing = billing
        self._meter = meter
        self.events_a_day = 0
        self._calls = calls
        self._chance = random.Random(7)
        self.records = 0
        self.events = 0

    async def open(self) -> None:
        """Credit for all, and a cap for the first half of the projects."""
        now = self._billing.clock.now()
        for number in range(ORGANIZATIONS):
            async with transaction(self._billing.pool) as connection:
                await add_credit(
                    connection,
                    organization_id=organization(number),
                    amount_nanos_usd=CREDIT_NANOS_USD,
                    request_id="first",
                    now=now,
                    limits=self._billing.settings.limits,
                )
                if number < ORGANIZATIONS // 2:
                    await BudgetStore(connection).set_budget(
                        organization_id=organization(number),
                        project_id=project(number),
                        api_key_id="",
                        monthly_cap_nanos_usd=CAP_NANOS_USD,
                        alert_percents=(50, 80, 100),
                        now=now,
                    )

    async def day(self, number: int) -> None:
        """All events of one day into the outbox."""
        await self._lease(number)
        messages = [*await self._jobs(number), *self._minutes(number)]
        messages += self._served(max(0, self.events_a_day - len(messages)))
        self._chance.shuffle(messages)
        for start in range(0, len(messages), TOGETHER):
            async with transaction(self._meter.pool) as connection:
                for message in messages[start : start + TOGETHER]:
                    await self._meter.outbox.add(connection, message, subject_name="projects/proj_0")
            self._meter.outbox.wake()
        self.events += len(messages)

    async def _lease(self, day: int) -> None:
        """Leases of a holder that dies and of one that closes them; both are to be gone in the end."""
        settings, now = self._billing.settings, self._billing.clock.now()
        for dies in (True, False):
            holder = f"holder-{day}-{dies}"
            leases = [f"{holder}-{number}" for number in range(max(2, self.events_a_day // LEASES_EVERY))]
            async with transaction(self._billing.pool) as connection:
                await LeaseStore(connection).renew_holder(holder, timedelta(seconds=settings.credit_lease_s))
            for number, lease_id in enumerate(leases):
                owner = ORGANIZATIONS // 2 + number % (ORGANIZATIONS // 2)
                request = GrantRequest(
                    holder=holder,
                    lease_id=lease_id,
                    organization_id=organization(owner),
                    spender=Spender(project(owner), f"key_{owner}"),
                    revision=1,
                    wish=Wish(required_nanos_usd=1, needed_nanos_usd=1, wanted_nanos_usd=10**6),
                )
                late = settings.credit_late_usage
                async with transaction(self._billing.pool) as connection:
                    await grant(connection, request, share=settings.credit_lease_share, late_usage=late, now=now)
            if not dies:
                async with transaction(self._billing.pool) as connection:
                    closed = [Returned(lease_id=each, revision=2, granted_nanos_usd=1, closed=True) for each in leases]
                    await LeaseStore(connection).give_back(holder, closed)
                    await LeaseStore(connection).delete_holder(holder)

    async def _jobs(self, day: int) -> list[Message]:
        messages: list[Message] = []
        now = self._billing.clock.now()
        for number in range(max(1, self.events_a_day // STEPS_EVERY // (STEPS_PER_JOB + 1))):
            # Of those without a cap, which would refuse it.
            owner = ORGANIZATIONS // 2 + number % (ORGANIZATIONS // 2)
            resource = f"projects/{project(owner)}/tuningJobs/ft-{day}-{number}"
            await self._hold(resource, owner, now)
            messages += _job(resource, owner, now)
            self.records += STEPS_PER_JOB
        return messages

    async def _hold(self, resource: str, owner: int, now: datetime) -> None:
        settings = self._billing.settings
        async with transaction(self._billing.pool) as connection:
            await holding.create_hold(
                connection,
                self._billing.catalogue.at(now),
                resource=resource,
                organization_id=organization(owner),
                project_id=project(owner),
                work=_WORK,
                now=now,
                limits=settings.limits,
                ttl=timedelta(seconds=settings.hold_ttl_s),
                late_usage=settings.credit_late_usage,
            )

    def _minutes(self, day: int) -> list[Message]:
        moment = self._billing.clock.now()
        count = self.events_a_day // MINUTES_EVERY
        self.records += count
        return [
            usage_events_pb2.EndpointMinuteRecorded(
                work_key=f"ep_{minute % ORGANIZATIONS}:{day}:{minute}",
                endpoint=f"projects/{project(minute % ORGANIZATIONS)}/endpoints/ep_{minute % ORGANIZATIONS}",
                project_id=project(minute % ORGANIZATIONS),
                organization_id=organization(minute % ORGANIZATIONS),
                hardware_type="cpu",
                device_count=1,
                minute=minute,
                usage_time=time_to_proto(moment),
            )
            for minute in range(count)
        ]

    def _served(self, events: int) -> Iterator[Message]:
        moment = time_to_proto(self._billing.clock.now())
        for _ in range(events):
            self.records += 2 * self._calls
            yield usage_events_pb2.InferenceUsageRecorded(records=[self._call(moment) for _ in range(self._calls)])

    def _call(self, moment: object) -> usage_events_pb2.InferenceUsage:
        owner = self._chance.randrange(ORGANIZATIONS)
        return usage_events_pb2.InferenceUsage(
            work_key=f"gen_{uuid.uuid4().hex}",
            project_id=project(owner),
            organization_id=organization(owner),
            model_id=f"acme/assistant-{self._chance.randrange(MODELS)}",
            base_model=BASE,
            input_tokens=self._chance.randint(20, 4000),
            output_tokens=self._chance.randint(1, 800),
            usage_time=moment,  # type: ignore[arg-type]
            api_key_id=f"key_{owner}",
        )


def _job(resource: str, owner: int, now: datetime) -> Sequence[Message]:
    """The usage of a job that its user cancelled, and its end: no model comes of it."""
    moment = time_to_proto(now)
    whose: dict[str, Any] = {
        "tuning_job": resource,
        "project_id": project(owner),
        "organization_id": organization(owner),
    }
    job_id = resource.rpartition("/")[2]
    steps = [
        usage_events_pb2.TrainingUsageRecorded(
            work_key=f"{job_id}:train:{start}-{start + 1}",
            kind="train",
            start_step=start,
            end_step=start + 1,
            tokens=1000,
            usage_time=moment,
            **whose,
        )
        for start in range(STEPS_PER_JOB)
    ]
    ended = tuning_events_pb2.TuningJobEnded(
        ending=tuning_events_pb2.TUNING_JOB_ENDING_CANCELLED_RUNNING,
        usage_record_count=STEPS_PER_JOB,
        end_time=moment,
        **whose,
    )
    return [*steps, ended]

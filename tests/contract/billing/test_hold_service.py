"""HoldService as the scheduler calls it, and the whole way of a job's money over the real bus."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from chassis.errors import AlreadyExists, DomainError, FailedPrecondition, InvalidArgument, PermissionDenied
from finemesh.billing.v1 import billing_service_pb2 as pb
from finemesh.billing.v1 import usage_record_pb2
from finemesh.events.v1 import tuning_events_pb2, usage_events_pb2
from finemesh.holds.v1.hold_service_pb2 import CreateHoldRequest, ReleaseHoldRequest
from tests.contract.billing.conftest import Customer, Mesh, job_price

USD = 10**9


def moment(minutes_ago: float) -> Timestamp:
    """Never in the month before, so that the running month's invoice has it."""
    now = datetime.now(UTC)
    month_start = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    value = Timestamp()
    value.FromDatetime(max(now - timedelta(minutes=minutes_ago), month_start))
    return value


def train(customer: Customer, start: int, end: int, tokens: int) -> usage_events_pb2.TrainingUsageRecorded:
    job = customer.job()
    return usage_events_pb2.TrainingUsageRecorded(
        work_key=f"{job.rpartition('/')[2]}:train:{start}-{end}",
        tuning_job=job,
        project_id=customer.project,
        organization_id=customer.organization,
        kind="train",
        start_step=start,
        end_step=end,
        tokens=tokens,
        usage_time=moment(5),
    )


def ended(
    customer: Customer, ending: "tuning_events_pb2.TuningJobEnding.ValueType", count: int
) -> tuning_events_pb2.TuningJobEnded:
    return tuning_events_pb2.TuningJobEnded(
        tuning_job=customer.job(),
        project_id=customer.project,
        organization_id=customer.organization,
        ending=ending,
        usage_record_count=count,
        end_time=moment(1),
    )


async def test_a_hold_is_the_quote(customer: Customer, mesh: Mesh) -> None:
    await customer.pay_in(6 * USD)
    made = await customer.hold()
    assert made.hold_id.startswith("hold_")
    assert (made.quote.total_nanos_usd, made.quote.minimum_applied) == (5 * USD, True)
    assert await customer.hold() == made
    with customer.calling():
        assert made.quote == await mesh.billing.EstimatePrice(job_price())
        balance = (await mesh.billing.GetBalance(pb.GetBalanceRequest())).balance
        assert (balance.available_nanos_usd, balance.held_nanos_usd) == (USD, 5 * USD)
        charge = await mesh.billing.GetJobCharge(pb.GetJobChargeRequest(tuning_job=customer.job()))
        assert (charge.quoted_nanos_usd, charge.held_nanos_usd, charge.settled) == (5 * USD, 5 * USD, False)
        assert len(charge.transaction_ids) == 1


async def test_too_little_credit(customer: Customer) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        await customer.hold()
    assert refused.value.reason == "BALANCE_INSUFFICIENT"
    assert refused.value.metadata["shortfall_nanos_usd"] == str(5 * USD)


async def test_other_numbers_for_the_same_job(customer: Customer) -> None:
    await customer.pay_in(20 * USD)
    await customer.hold()
    with pytest.raises(AlreadyExists, match="quoted once"):
        await customer.hold(epochs=3)


async def test_release(customer: Customer, mesh: Mesh) -> None:
    await customer.pay_in(5 * USD)
    await customer.hold()
    request = ReleaseHoldRequest(resource=customer.job())
    assert (await mesh.holds.ReleaseHold(request)).released_nanos_usd == 5 * USD
    assert (await mesh.holds.ReleaseHold(request)).released_nanos_usd == 0
    with customer.calling("admin"):
        charge = await mesh.billing.GetJobCharge(pb.GetJobChargeRequest(tuning_job=customer.job()))
        assert (charge.settled, charge.charged_nanos_usd, charge.released_nanos_usd) == (True, 0, 5 * USD)
    with pytest.raises(FailedPrecondition, match="STATE_CONFLICT"):
        await customer.hold()


async def test_malformed_holds_name_their_field(customer: Customer, mesh: Mesh) -> None:
    good = CreateHoldRequest(
        resource=customer.job(),
        organization_id=customer.organization,
        project_id=customer.project,
        price=job_price(),
    )
    for field, value in (("resource", "nonsense"), ("organization_id", "a b"), ("project_id", "other")):
        wrong = CreateHoldRequest()
        wrong.CopyFrom(good)
        setattr(wrong, field, value)
        with pytest.raises(InvalidArgument) as refused:
            await mesh.holds.CreateHold(wrong)
        assert [violation.field for violation in refused.value.violations] == [field]
    for changes, field in (
        ({"epochs": 0}, "price.epochs"),
        ({"price_book_version": "together-2026"}, "price.price_book_version"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await customer.hold(**changes)
        assert [violation.field for violation in refused.value.violations] == [field]
    with pytest.raises(InvalidArgument):
        await mesh.holds.ReleaseHold(ReleaseHoldRequest(resource=""))


async def test_only_the_scheduler_holds(customer: Customer, mesh: Mesh) -> None:
    with pytest.raises(PermissionDenied) as refused:
        await mesh.misplaced.ReleaseHold(ReleaseHoldRequest(resource=customer.job()))
    assert refused.value.reason == "CALLER_NOT_ALLOWED"


async def test_200_calls_for_1_on_a_balance_of_100(customer: Customer, mesh: Mesh) -> None:
    await customer.pay_in(100 * 5 * USD)

    async def attempt(number: int) -> bool:
        try:
            await customer.hold(number)
        except DomainError as error:
            assert error.reason == "BALANCE_INSUFFICIENT"
            return False
        return True

    outcomes = await asyncio.gather(*(attempt(number) for number in range(1, 201)))
    assert outcomes.count(True) == 100
    with customer.calling():
        balance = (await mesh.billing.GetBalance(pb.GetBalanceRequest())).balance
        assert (balance.available_nanos_usd, balance.held_nanos_usd) == (0, 500 * USD)


async def test_from_quote_to_invoice_over_the_bus(customer: Customer, mesh: Mesh) -> None:
    await customer.pay_in(50 * USD)
    quote = (
        await customer.hold(base_model="meta-llama/Llama-3.1-8B", training_tokens=1_000_000, validation_tokens=0)
    ).quote
    assert quote.total_nanos_usd == 12_200_000_000
    # The end overtakes one of the records, and the other one comes twice.
    first, second = train(customer, 0, 10, 800_000), train(customer, 10, 20, 1_200_000)
    await mesh.publish(first, key="one")
    await mesh.publish(first)
    await mesh.publish(ended(customer, tuning_events_pb2.TUNING_JOB_ENDING_COMPLETED, 2))
    await mesh.until("SELECT count(*) FROM job_endings WHERE resource = $1", 1, customer.job())
    await mesh.publish(second)
    await mesh.until("SELECT state FROM holds WHERE resource = $1", "settled", customer.job())
    with customer.calling("admin"):
        charge = await mesh.billing.GetJobCharge(pb.GetJobChargeRequest(tuning_job=customer.job()))
        assert charge.quoted_nanos_usd == charge.held_nanos_usd == charge.charged_nanos_usd == quote.total_nanos_usd
        assert (charge.released_nanos_usd, charge.settled, len(charge.transaction_ids)) == (0, True, 2)
        records = (
            await mesh.billing.ListUsageRecords(pb.ListUsageRecordsRequest(resource=customer.job()))
        ).usage_records
        assert sorted(record.quantity for record in records) == [800_000, 1_200_000]
        assert sum(record.amount_nanos_usd for record in records) == quote.total_nanos_usd
        invoice = (await mesh.billing.GetInvoice(pb.GetInvoiceRequest())).invoice
    (line,) = invoice.lines
    assert (line.kind, line.unit, line.quantity, line.amount_nanos_usd) == (
        "tuning",
        "tokens",
        2_000_000,
        12_200_000_000,
    )
    assert line.unit_price_nanos_usd == 6_100_000_000
    assert sorted(line.usage_records) == sorted(record.name for record in records)
    assert (invoice.total.units, invoice.total.nanos) == (12, 200_000_000)


async def test_served_usage_is_paged_priced_and_invoiced(customer: Customer, mesh: Mesh) -> None:
    calls = [
        usage_events_pb2.InferenceUsage(
            work_key=f"{customer.organization}-gen-{number}",
            project_id=customer.project,
            organization_id=customer.organization,
            model_id="acme/bot",
            base_model="finemesh/demo-llama",
            input_tokens=100_000,
            output_tokens=50_000,
            usage_time=moment(number),
        )
        for number in range(3)
    ]
    minute = usage_events_pb2.EndpointMinuteRecorded(
        work_key="ep_1:1:0",
        endpoint=f"projects/{customer.project}/endpoints/ep_1",
        project_id=customer.project,
        organization_id=customer.organization,
        hardware_type="nvidia-h100-80gb",
        device_count=2,
        minute=0,
        usage_time=moment(9),
    )
    await mesh.publish(usage_events_pb2.InferenceUsageRecorded(records=calls))
    await mesh.publish(minute)
    await mesh.until("SELECT count(*) FROM usage_records WHERE project_id = $1", 7, customer.project)
    pages: list[list[usage_record_pb2.UsageRecord]] = []
    request = pb.ListUsageRecordsRequest(page_size=3)
    with customer.calling("admin"):
        while True:
            response = await mesh.billing.ListUsageRecords(request)
            pages.append(list(response.usage_records))
            if not response.next_page_token:
                break
            request.page_token = response.next_page_token
        only = await mesh.billing.ListUsageRecords(pb.ListUsageRecordsRequest(resource=minute.endpoint))
        balance = (await mesh.billing.GetBalance(pb.GetBalanceRequest())).balance
        invoice = (await mesh.billing.GetInvoice(pb.GetInvoiceRequest())).invoice
    assert [len(page) for page in pages] == [3, 3, 1]
    records = [record for page in pages for record in page]
    assert len({record.name for record in records}) == 7
    times = [record.usage_time.ToDatetime() for record in records]
    assert times == sorted(times, reverse=True)
    assert [record.kind for record in only.usage_records] == [usage_record_pb2.USAGE_KIND_ENDPOINT_MINUTES]
    # 300,000 tokens read at 0.05 dollars a million, 150,000 written at 0.10, two device minutes at 0.056.
    assert (balance.available_nanos_usd, balance.owed_nanos_usd) == (0, 15_000_000 + 15_000_000 + 112_000_000)
    assert [(line.kind, line.amount_nanos_usd, line.usage_record_count) for line in invoice.lines] == [
        ("endpoint", 112_000_000, 1),
        # A line for each direction.
        ("inference", 15_000_000, 3),
        ("inference", 15_000_000, 3),
    ]
    assert (invoice.total_nanos_usd, invoice.rounding_nanos_usd) == (140_000_000, -2_000_000)


async def test_what_cannot_be_booked_is_set_aside_with_its_reason(customer: Customer, mesh: Mesh) -> None:
    await customer.pay_in(5 * USD)
    await customer.hold()
    await mesh.publish(train(customer, 0, 10, -1))
    await mesh.until(
        "SELECT count(*) FROM dead_letters WHERE reason = 'EVENT_INVALID' AND error LIKE '%tokens must be from 0%'", 1
    )
    with customer.calling("admin"):
        charge = await mesh.billing.GetJobCharge(pb.GetJobChargeRequest(tuning_job=customer.job()))
    assert not charge.settled

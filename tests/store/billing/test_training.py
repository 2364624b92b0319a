"""Usage and endings on the real database: any order, any repetition, the same ledger."""

import random
from datetime import UTC, datetime

import pytest
from google.protobuf.message import Message

from chassis.clock import ManualClock
from chassis.db.pool import transaction
from chassis.errors import DomainError, InvalidArgument, NotFound
from finemesh.events.v1 import tuning_events_pb2, usage_events_pb2
from tests.harness.servers import PostgresServer
from tests.store.billing.conftest import fresh_world
from tests.store.billing.world import LARGE, USD, World, at, ended, evaluate, minute, served, train, whole_run


async def test_a_completed_job_is_charged_its_quote_exactly_once(world: World) -> None:
    await world.top_up("o", 20 * USD)
    await world.hold("o", work=LARGE)
    run: list[Message] = [train("o", step, step + 20, tokens_per_step=10_000) for step in range(0, 200, 20)]
    run += [evaluate("o", number, tokens=50_000) for number in range(1, 7)]
    await world.deliver(*run, ended("o", "COMPLETED", len(run)))
    hold = await world.hold_row("o")
    assert (hold["state"], hold["charged_nanos_usd"], hold["discrepancy"]) == ("settled", 14_030_000_000, "")
    assert hold["held_nanos_usd"] == hold["charged_nanos_usd"]
    balances = await world.balances("o")
    assert (balances["prepaid"], balances["held"], balances["revenue"]) == (5_970_000_000, 0, 14_030_000_000)


async def test_settlement_waits_for_every_record_in_any_order(world: World) -> None:
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    run = whole_run("o")
    await world.deliver(ended("o", "COMPLETED", len(run)))
    for message in run[:-1]:
        await world.deliver(message)
        assert (await world.hold_row("o"))["state"] == "held"
    await world.deliver(run[-1])
    hold = await world.hold_row("o")
    assert (hold["state"], hold["charged_nanos_usd"], hold["minimum_applied"]) == ("settled", 5 * USD, True)
    assert hold["discrepancy"] == ""


@pytest.mark.parametrize("ending", ["CANCELLED_RUNNING", "STOPPED_EARLY", "USER_FAILURE"])
async def test_unfinished_jobs_pay_for_finished_steps(world: World, ending: str) -> None:
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    await world.deliver(train("o", 0, 20), evaluate("o", 1), ended("o", ending, 2))
    hold = await world.hold_row("o")
    # 25,000 tokens at 6,100 nano-dollars each.
    assert (hold["state"], hold["charged_nanos_usd"]) == ("settled", 152_500_000)
    assert (await world.balances("o"))["prepaid"] == 5 * USD - 152_500_000


@pytest.mark.parametrize("ending", ["PLATFORM_FAILURE", "REFUSED", "CANCELLED_BEFORE_RUN"])
async def test_what_is_not_owed_is_released_at_once(world: World, ending: str) -> None:
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    await world.deliver(ended("o", ending, 1))
    assert (await world.hold_row("o"))["state"] == "settled"
    assert (await world.balances("o"))["prepaid"] == 5 * USD
    # The late record is kept as a fact and changes no money.
    await world.deliver(train("o", 0, 20))
    assert await world.pool.fetchval("SELECT count(*) FROM usage_records") == 1
    assert (await world.balances("o"))["prepaid"] == 5 * USD


async def test_work_that_contradicts_the_quote_is_flagged_and_never_above_the_hold(world: World) -> None:
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    await world.deliver(train("o", 0, 20, tokens_per_step=10**6), ended("o", "COMPLETED", 1))
    hold = await world.hold_row("o")
    assert hold["charged_nanos_usd"] == 5 * USD
    assert "was quoted" in hold["discrepancy"]


async def test_an_ending_without_a_hold_owes_nothing(world: World) -> None:
    await world.deliver(ended("o", "REFUSED", 0), ended("o", "REFUSED", 0))
    assert await world.pool.fetchval("SELECT count(*) FROM job_endings") == 1
    assert await world.pool.fetchval("SELECT count(*) FROM transactions") == 0


async def test_usage_is_charged_to_the_credit_and_beyond_it_is_owed(world: World) -> None:
    await world.top_up("o", 2_000_000)
    await world.deliver(minute("o", 0), minute("o", 1), minute("o", 2))
    balances = await world.balances("o")
    assert (balances["prepaid"], balances["receivable"], balances["revenue"]) == (2_000_000, -3_000_000, 3_000_000)
    # Nothing is free, so nothing can be held, however small; the next credit pays what is owed first.
    with pytest.raises(DomainError, match=r"0\.00 USD are free"):
        await world.hold("o")
    await world.top_up("o", 5 * USD, "second")
    with pytest.raises(DomainError, match=r"4\.999 USD are free"):
        await world.hold("o")
    await world.top_up("o", 1_000_000, "third")
    await world.hold("o")


async def test_served_tokens_are_priced_by_direction(world: World) -> None:
    await world.deliver(served("o", ("gen-1", 1000, 20), ("gen-2", 0, 7), ("gen-3", 0, 0)))
    rows = await world.pool.fetch("SELECT work_key, quantity, amount_nanos_usd FROM usage_records ORDER BY 1")
    # 0.05 dollars per million read, 0.10 per million written.
    assert [tuple(row) for row in rows] == [
        ("gen-1:input", 1000, 50_000),
        ("gen-1:output", 20, 2_000),
        ("gen-2:output", 7, 700),
    ]
    assert (await world.balances("o"))["receivable"] == -52_700
    # One entry stands for the calls of one model.
    assert await world.pool.fetchval("SELECT count(*) FROM transactions") == 1


@pytest.mark.parametrize("together", [True, False])
async def test_a_call_that_is_reported_again_at_another_time_is_the_same(world: World, together: bool) -> None:
    first, again, other = (served("o", ("gen-1", 10, tokens)) for tokens in (10, 10, 11))
    again.records[0].usage_time.CopyFrom(at(2))
    again.records[0].api_key_id = "key_1"
    reports = usage_events_pb2.InferenceUsageRecorded()
    for message in (first, again, other):
        reports.MergeFrom(message)
    if together:
        await world.deliver(reports)
    else:
        await world.deliver(first, again, served("o", ("gen-2", 1, 1)))
        with pytest.raises(InvalidArgument, match="other numbers"):
            await world.deliver(other)
    rows = await world.pool.fetch("SELECT payload FROM dead_letters")
    refused = [usage_events_pb2.InferenceUsageRecorded.FromString(row["payload"]) for row in rows]
    assert refused == ([other] if together else [])
    assert await world.pool.fetchval("SELECT sum(quantity) FROM usage_records WHERE work_key LIKE 'gen-1%'") == 20


async def test_a_minute_costs_its_devices(world: World) -> None:
    await world.deliver(minute("o", 0, hardware="nvidia-h100-80gb", devices=8))
    row = await world.pool.fetchrow("SELECT quantity, unit_price_nanos_usd, amount_nanos_usd FROM usage_records")
    assert row is not None
    assert tuple(row) == (8, 56_000_000, 448_000_000)


def _training(**changes: object) -> Message:
    message = train("o", 0, 20)
    for name, value in changes.items():
        if name == "usage_time":
            message.usage_time.CopyFrom(value)  # type: ignore[attr-defined]
        else:
            setattr(message, name, value)
    return message


def _served(**changes: object) -> Message:
    message = served("o", ("gen-1", 10, 10))
    for name, value in changes.items():
        setattr(message.records[0], name, value)
    return message


IMPOSSIBLE: list[Message] = [
    _training(tokens=-5),
    _training(tokens=10**15),
    _training(kind="magic"),
    _training(work_key="ft-2:train:0-20"),
    _training(work_key=""),
    _training(end_step=0),
    # Under a key that does not follow from it, the same work could be booked twice.
    _training(work_key="ft-1:train:0-19"),
    _training(work_key="ft-1:evaluate:0"),
    _training(kind="evaluate", work_key="ft-1:evaluate:2"),
    _training(project_id="stranger"),
    _training(organization_id="stranger"),
    _training(tuning_job="nonsense"),
    _training(usage_time=at(10_000)),
    _served(input_tokens=-1),
    _served(base_model=""),
    _served(organization_id=""),
    _served(organization_id="acme corp"),
    _served(project_id="o/p"),
    usage_events_pb2.InferenceUsageRecorded(records=[usage_events_pb2.InferenceUsage(work_key="x")]),
    minute("o", 0, hardware="abacus"),
    minute("o", 0, devices=0),
    minute("o", -1),
    ended("o", "COMPLETED", -1),
    ended("o", "UNSPECIFIED", 0),
    tuning_events_pb2.TuningJobEnded(tuning_job="projects/o-p/tuningJobs/ft-1", project_id="o-p"),
    tuning_events_pb2.TuningJobEnded(
        tuning_job="projects/o-p/tuningJobs/ft-9",
        project_id="o-p",
        organization_id="acme corp",
        ending=tuning_events_pb2.TUNING_JOB_ENDING_REFUSED,
        end_time=at(0),
    ),
]


async def test_claims_that_cannot_be_true_are_refused_for_good(world: World) -> None:
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    before = await world.dump()
    for message in IMPOSSIBLE:
        # InvalidArgument is what the consumer sets aside at once, with the reason.
        with pytest.raises(InvalidArgument) as refused:
            await world.deliver(message)
        assert refused.value.reason in ("EVENT_INVALID", "INVALID_FIELD", "PRICE_UNKNOWN"), message
        assert await world.dump() == before, message


async def test_tokens_without_a_hold_wait_and_are_not_booked(world: World) -> None:
    with pytest.raises(NotFound, match="has no hold"):
        await world.deliver(train("o", 0, 20))


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        (train("o", 0, 20), train("o", 10, 30), "paid twice"),
        (train("o", 0, 20), train("o", 0, 20, tokens_per_step=2000), "other numbers"),
        (served("o", ("gen-1", 10, 10)), served("o", ("gen-1", 11, 10)), "other numbers"),
        (ended("o", "CANCELLED_RUNNING", 0), train("o", 0, 20), "one more"),
        (train("o", 0, 20), ended("o", "CANCELLED_RUNNING", 0), "but 1 are booked"),
        (ended("o", "CANCELLED_RUNNING", 0), ended("o", "COMPLETED", 0), "ended as cancelled_running"),
    ],
)
async def test_contradicting_facts_are_set_aside(world: World, first: Message, second: Message, problem: str) -> None:
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    await world.deliver(first, first)
    before = await world.dump()
    with pytest.raises(InvalidArgument, match=problem):
        await world.deliver(second)
    assert await world.dump() == before


async def test_a_step_is_booked_once_whatever_range_it_comes_in(world: World) -> None:
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    await world.deliver(train("o", 60, 80), train("o", 20, 40))
    for start, end in ((0, 21), (20, 21), (25, 30), (39, 60), (0, 50), (30, 70), (40, 61), (79, 100), (0, 100)):
        with pytest.raises(InvalidArgument, match="paid twice"):
            await world.deliver(train("o", start, end))
    await world.deliver(train("o", 80, 100), train("o", 40, 60), train("o", 0, 20), evaluate("o", 30))


async def test_booking_for_a_job_reads_as_much_however_much_is_booked(world: World) -> None:
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    await world.deliver(train("o", 0, 20))
    columns = "kind, organization_id, project_id, resource, model, quantity, unit_price_nanos_usd, amount_nanos_usd"
    columns += ", price_book_version, usage_time, api_key_id, billing_month"
    await world.pool.execute(
        f"INSERT INTO usage_records (work_key, start_step, end_step, {columns})"  # noqa: S608
        f" SELECT 'ft-1:train:' || n * 20, n * 20, n * 20 + 20, {columns}"
        " FROM usage_records CROSS JOIN generate_series(1, 5000) AS n"
    )
    await world.pool.execute("ANALYZE usage_records")
    # The ending comes first, so each record that comes after it is counted against the announced number.
    await world.deliver(ended("o", "CANCELLED_RUNNING", 6000))
    last = train("o", 200_000, 200_020)
    last.usage_time.CopyFrom(at(1))  # type: ignore[attr-defined]
    async with transaction(world.pool) as connection:
        await world.handle(connection, last)
        read = await connection.fetchval(
            "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint FROM pg_stat_xact_user_tables"
            " WHERE relname IN ('usage_records', 'usage_sums')"
        )
    assert read < 50


@pytest.mark.parametrize("ending", ["CANCELLED_RUNNING", "CANCELLED_BEFORE_RUN", "PLATFORM_FAILURE", "COMPLETED"])
async def test_usage_of_a_released_hold_is_set_aside_in_every_order(
    world: World, postgres: PostgresServer, ending: str
) -> None:
    dumps = []
    async with fresh_world(postgres) as other:
        for each, order in ((world, [train("o", 0, 20), ended("o", ending, 1)]), (other, None)):
            await each.top_up("o", 5 * USD)
            await each.hold("o")
            await each.release("o")
            for message in order or [ended("o", ending, 1), train("o", 0, 20)]:
                if isinstance(message, usage_events_pb2.TrainingUsageRecorded):
                    with pytest.raises(InvalidArgument, match="was released"):
                        await each.deliver(message)
                else:
                    await each.deliver(message)
            dumps.append(await each.dump())
    assert dumps[0] == dumps[1]
    assert not any("usage_records" in line for line in dumps[0])


async def test_a_job_keeps_the_version_it_was_quoted_with(world: World) -> None:
    """Quoted on the last day of a version, run and settled under the next one."""
    await world.top_up("o", 10 * USD)
    now, world.clock = world.clock, ManualClock(datetime(2026, 10, 31, tzinfo=UTC))
    await world.hold("o")
    world.clock = now
    await world.hold("o", "ft-2")
    await world.deliver(train("o", 0, 20), train("o", 0, 20, "ft-2"), ended("o", "CANCELLED_RUNNING", 1))
    rows = await world.pool.fetch("SELECT work_key, price_book_version FROM usage_records ORDER BY 1")
    assert [tuple(row) for row in rows] == [
        ("ft-1:train:0-20", "default-2026-1"),
        ("ft-2:train:0-20", "default-2026-2"),
    ]
    assert (await world.hold_row("o"))["price_book_version"] == "default-2026-1"
    settled_by = "SELECT price_book_version FROM transactions WHERE kind = 'settlement'"
    assert await world.pool.fetchval(settled_by) == "default-2026-1"


def _story() -> list[Message]:
    """Two organizations: a completed job, a cancelled one, a failed one, and more served than one of them paid for."""
    events = [*whole_run("a"), ended("a", "COMPLETED", 16)]
    events += [train("b", 0, 20), evaluate("b", 1), ended("b", "CANCELLED_RUNNING", 2)]
    events += [train("b", 0, 40, job="ft-2"), ended("b", "PLATFORM_FAILURE", 1, job="ft-2")]
    events += [served("a", *((f"gen-{batch}-{call}", 1000 + call, 10) for call in range(5))) for batch in range(4)]
    # A long call, told in parts.
    events += [served("a", ("gen-long:0-128", 500, 128)), served("a", ("gen-x", 1, 1), ("gen-long:128-301", 0, 173))]
    # Ten dollars of device minutes on top of what b has left: it ends in debt.
    events += [minute("b", number, hardware="nvidia-h200-141gb", devices=8) for number in range(20)]
    return events


async def _book(world: World, events: list[Message]) -> list[str]:
    for organization in ("a", "b"):
        await world.top_up(organization, 15 * USD)
        await world.hold(organization)
    await world.hold("b", "ft-2")
    await world.deliver(*events)
    return await world.dump()


@pytest.mark.parametrize("seed", range(4))
async def test_replay_doubled_and_shuffled_gives_the_same_ledger_byte_for_byte(
    world: World, postgres: PostgresServer, seed: int
) -> None:
    once = await _book(world, _story())
    assert any("receivable" in line and "-13" in line for line in once)
    shuffled = _story() * 2
    random.Random(seed).shuffle(shuffled)
    async with fresh_world(postgres) as other:
        assert await _book(other, shuffled) == once


async def test_a_replay_in_the_same_order_gives_the_same_chain(world: World, postgres: PostgresServer) -> None:
    once = await _book(world, _story())
    async with fresh_world(postgres) as other:
        # Every event twice: the second delivery adds no link.
        assert await _book(other, [event for event in _story() for _ in range(2)]) == once
        assert await other.chain() == await world.chain()
    links = await world.pool.fetch("SELECT organization_id, position FROM transactions ORDER BY 1, 2")
    assert [row["position"] for row in links if row["organization_id"] == "a"] == list(range(1, 1 + 9))


async def test_the_good_calls_of_a_message_are_booked_and_the_others_set_aside(world: World) -> None:
    message = served("o", ("gen-1", 10, 10), ("gen-2", -1, 5), ("gen-3", 7, 0), ("gen-1", 10, 11))
    await world.deliver(message, message)
    rows = await world.pool.fetch("SELECT work_key, quantity FROM usage_records ORDER BY 1")
    assert [tuple(row) for row in rows] == [("gen-1:input", 10), ("gen-1:output", 10), ("gen-3:input", 7)]
    letters = await world.pool.fetch("SELECT payload, reason, error FROM dead_letters")
    kept = usage_events_pb2.InferenceUsageRecorded.FromString(letters[0]["payload"])
    assert [(record.work_key, record.output_tokens) for record in kept.records] == [("gen-2", 5), ("gen-1", 11)]
    assert "2 of 4 calls cannot be booked" in letters[0]["error"]
    assert letters[0]["reason"] == "EVENT_INVALID"
    # 17 tokens read at 50 and 10 written at 100 nano-dollars.
    assert (await world.balances("o"))["receivable"] == -1_850


async def test_calls_that_another_message_booked_are_booked_once(world: World) -> None:
    await world.deliver(served("o", ("gen-1", 10, 0), ("gen-2", 10, 0)))
    await world.deliver(served("o", ("gen-2", 10, 0), ("gen-3", 10, 0)))
    assert (await world.balances("o"))["receivable"] == -1_500
    posted = await world.pool.fetch(
        "SELECT u.work_key, t.position FROM usage_records AS u"
        " JOIN transactions AS t ON t.id = u.transaction_id ORDER BY 1"
    )
    assert [tuple(row) for row in posted] == [("gen-1:input", 1), ("gen-2:input", 1), ("gen-3:input", 2)]


async def test_a_call_grows_by_its_parts_in_any_order(world: World) -> None:
    last, first = served("o", ("gen-1:128-301", 0, 173)), served("o", ("gen-1:0-128", 10, 128))
    await world.deliver(last, first, last, first)
    rows = await world.pool.fetch("SELECT work_key, quantity FROM usage_records ORDER BY 1")
    assert [tuple(row) for row in rows] == [
        ("gen-1:0-128:input", 10),
        ("gen-1:0-128:output", 128),
        ("gen-1:128-301:output", 173),
    ]
    # 10 tokens read at 50 and 301 written at 100 nano-dollars.
    assert (await world.balances("o"))["receivable"] == -30_600
    with pytest.raises(InvalidArgument, match="other numbers"):
        await world.deliver(served("o", ("gen-1:0-128", 11, 128)))
    with pytest.raises(InvalidArgument, match="work key"):
        await world.deliver(served("o", ("gen-1:301-400", 0, 98)))


async def test_sums_follow_the_records(world: World) -> None:
    await _book(world, _story())
    differences = await world.pool.fetch(
        """
        SELECT * FROM (
            SELECT organization_id, project_id, usage_time::date AS day, kind, resource, model,
                sum(quantity)::bigint AS quantity, sum(amount_nanos_usd)::bigint AS amount, count(*) AS records
            FROM usage_records GROUP BY 1, 2, 3, 4, 5, 6
        ) AS records
        FULL JOIN (
            SELECT organization_id, project_id, usage_day AS day, kind, resource, model, quantity,
                amount_nanos_usd AS amount, record_count AS records
            FROM usage_sums
        ) AS sums USING (organization_id, project_id, day, kind, resource, model, quantity, amount, records)
        WHERE records.organization_id IS NULL OR sums.organization_id IS NULL
        """
    )
    assert differences == []
    assert await world.pool.fetchval("SELECT count(*) FROM usage_sums") > 5

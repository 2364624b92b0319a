"""LedgerService as the gateway calls it: verification with its progress, the journal, dead letters,
and who may see what."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import nats
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from chassis.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted
from chassis.identity import Caller, acting_as
from finemesh.billing.v1 import billing_service_pb2
from finemesh.billing.v1 import ledger_service_pb2 as pb
from finemesh.billing.v1.ledger_service_pb2_grpc import LedgerServiceStub
from finemesh.events.v1 import usage_events_pb2
from finemesh.events.v1.dead_letter_events_pb2 import EventSetAside
from finemesh_client.accounting.beancount import render
from finemesh_client.accounting.journal import Recomputed, recompute
from tests.contract.billing.conftest import Customer, Mesh
from tests.harness.polling import eventually
from tests.harness.servers import NatsServer, PostgresServer

if TYPE_CHECKING:
    from finemesh.billing.v1.ledger_service_pb2_grpc import LedgerServiceAsyncStub

USD = 10**9
BEAN_CHECK = Path(sys.executable).with_name("bean-check")
LETTERS = "SELECT count(*) FROM dead_letters WHERE position($1::bytea IN payload) > 0"


@pytest.fixture
def ledger(mesh: Mesh) -> "LedgerServiceAsyncStub":
    return LedgerServiceStub(mesh.channels["gateway"])


@asynccontextmanager
async def superuser(postgres: PostgresServer, mesh: Mesh) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Past every trigger of the database."""
    name = await mesh.pool.fetchval("SELECT current_database()")
    connection = await asyncpg.connect(
        postgres.cluster.url(database=name),
        server_settings={"search_path": name, "session_replication_role": "replica"},
    )
    try:
        yield connection
    finally:
        await connection.close()


def now() -> Timestamp:
    value = Timestamp()
    value.FromDatetime(datetime.now(UTC))
    return value


def served(customer: Customer, *calls: tuple[str, int]) -> usage_events_pb2.InferenceUsageRecorded:
    """Calls as (key, input tokens)."""
    return usage_events_pb2.InferenceUsageRecorded(
        records=[
            usage_events_pb2.InferenceUsage(
                work_key=f"{customer.organization}-{key}",
                project_id=customer.project,
                organization_id=customer.organization,
                model_id="acme/bot",
                base_model="finemesh/demo-llama",
                input_tokens=tokens,
                usage_time=now(),
            )
            for key, tokens in calls
        ]
    )


async def spend(customer: Customer) -> None:
    """A top-up, an open hold and two calls: four entries."""
    await customer.pay_in(20 * USD)
    await customer.hold()
    mesh = customer.mesh
    await mesh.publish(served(customer, ("gen-1", 1000)))
    await mesh.publish(served(customer, ("gen-2", 2000)))
    await mesh.until("SELECT count(*) FROM usage_records WHERE project_id = $1", 2, customer.project)


async def answers(call: Any) -> list[Any]:
    return [answer async for answer in call]


async def test_one_s_own_ledger_is_verified_with_progress(customer: Customer, ledger: "LedgerServiceAsyncStub") -> None:
    await spend(customer)
    with customer.calling("admin"):
        told = await answers(ledger.VerifyLedger(pb.VerifyLedgerRequest()))
    last = told[-1]
    assert (last.done, last.HasField("difference")) == (True, False)
    assert (last.transaction_count, last.usage_record_count, last.hold_count, last.invoice_count) == (4, 2, 1, 0)
    assert [answer.done for answer in told[:-1]] == [False] * (len(told) - 1)
    assert {"hash chain", "holds", "usage", "usage sums"} <= {answer.check for answer in told}
    counts = [answer.transaction_count for answer in told]
    assert counts == sorted(counts)


async def test_a_difference_is_named_and_all_is_verified_by_operators(
    customer: Customer, stranger: Customer, mesh: Mesh, ledger: "LedgerServiceAsyncStub", postgres: PostgresServer
) -> None:
    await spend(customer)
    await spend(stranger)
    change = (
        "UPDATE accounts SET balance_nanos_usd = balance_nanos_usd + $1"
        " WHERE (organization_id, account) = ($2, 'prepaid')"
    )
    async with superuser(postgres, mesh) as connection:
        await connection.execute(change, 5, stranger.organization)
        with customer.calling("operator", "admin"):
            theirs = pb.VerifyLedgerRequest(organization=f"organizations/{stranger.organization}")
            outcomes = [
                (await answers(ledger.VerifyLedger(request)))[-1]
                for request in (
                    pb.VerifyLedgerRequest(),
                    theirs,
                    pb.VerifyLedgerRequest(organization="organizations/-"),
                )
            ]
        await connection.execute(change, -5, stranger.organization)
    own, named, everything = outcomes
    assert not own.HasField("difference")
    for outcome in (named, everything):
        assert outcome.done
        assert outcome.difference.check == "balances"
        assert outcome.difference.location == f"organizations/{stranger.organization} account prepaid"
        assert int(outcome.difference.found) - int(outcome.difference.expected) == 5
    with customer.calling("operator", "admin"):
        again = (await answers(ledger.VerifyLedger(pb.VerifyLedgerRequest(organization="organizations/-"))))[-1]
    assert (again.done, again.HasField("difference")) == (True, False)


async def test_ledgers_of_others_need_the_operator(
    customer: Customer, stranger: Customer, ledger: "LedgerServiceAsyncStub"
) -> None:
    name = f"organizations/{stranger.organization}"
    with customer.calling("admin", "member"):
        for call in (
            ledger.VerifyLedger(pb.VerifyLedgerRequest(organization=name)),
            ledger.VerifyLedger(pb.VerifyLedgerRequest(organization="organizations/-")),
            ledger.ExportJournal(pb.ExportJournalRequest(organization=name)),
        ):
            with pytest.raises(PermissionDenied) as refused:
                await answers(call)
            assert refused.value.reason == "ROLE_MISSING"
        for unary in (
            ledger.ListDeadLetters(pb.ListDeadLettersRequest()),
            ledger.ReplayDeadLetter(pb.ReplayDeadLetterRequest(event_id="6f1f8a54-0000-4000-8000-000000000001")),
        ):
            with pytest.raises(PermissionDenied) as denied:
                await unary
            assert denied.value.reason == "ROLE_MISSING"
    with acting_as(Caller(service="gateway")):
        for call in (
            ledger.VerifyLedger(pb.VerifyLedgerRequest()),
            ledger.ExportJournal(pb.ExportJournalRequest()),
        ):
            with pytest.raises(PermissionDenied) as nobody:
                await answers(call)
            assert nobody.value.reason == "CALLER_NOT_ALLOWED"


@pytest.mark.parametrize(
    ("request_type", "fields", "field"),
    [
        (pb.VerifyLedgerRequest, {"organization": "nonsense"}, "organization"),
        (pb.ExportJournalRequest, {"organization": "nonsense"}, "organization"),
        (pb.ExportJournalRequest, {"organization": "organizations/-"}, "organization"),
        (pb.ExportJournalRequest, {"after_position": -1}, "after_position"),
    ],
)
async def test_streams_name_the_field_that_is_wrong(
    customer: Customer, ledger: "LedgerServiceAsyncStub", request_type: Any, fields: dict[str, Any], field: str
) -> None:
    method = ledger.VerifyLedger if request_type is pb.VerifyLedgerRequest else ledger.ExportJournal
    with customer.calling("operator", "admin"), pytest.raises(InvalidArgument) as refused:
        await answers(method(request_type(**fields)))
    assert [violation.field for violation in refused.value.violations] == [field]


async def test_one_verification_at_a_time(
    customer: Customer, mesh: Mesh, ledger: "LedgerServiceAsyncStub", postgres: PostgresServer
) -> None:
    await spend(customer)
    async with superuser(postgres, mesh) as connection, connection.transaction():
        await connection.execute("LOCK TABLE usage_sums IN ACCESS EXCLUSIVE MODE")
        with customer.calling("admin"):
            first = aiter(ledger.VerifyLedger(pb.VerifyLedgerRequest()))
            assert (await anext(first)).check
            with pytest.raises(ResourceExhausted) as refused:
                await answers(ledger.VerifyLedger(pb.VerifyLedgerRequest()))
        assert refused.value.metadata["limit"] == "verifications_max"
    assert (await answers(first))[-1].done
    with customer.calling("admin"):
        assert (await answers(ledger.VerifyLedger(pb.VerifyLedgerRequest())))[-1].done


async def test_a_verification_that_is_given_up_leaves_room_for_the_next(
    customer: Customer, ledger: "LedgerServiceAsyncStub"
) -> None:
    await spend(customer)
    with customer.calling("admin"):
        left = ledger.VerifyLedger(pb.VerifyLedgerRequest())
        await left.read()
        left.cancel()

        async def verified() -> pb.VerifyLedgerResponse | None:
            try:
                return (await answers(ledger.VerifyLedger(pb.VerifyLedgerRequest())))[-1]
            except ResourceExhausted:
                return None

        # The server hears of the end a moment later.
        outcome = await eventually(verified)
        assert outcome is not None
        assert outcome.done


async def test_the_journal_recomputes_to_the_balance_and_beancount_finds_it_balanced(
    customer: Customer, stranger: Customer, mesh: Mesh, ledger: "LedgerServiceAsyncStub", tmp_path: Path
) -> None:
    await spend(customer)
    await stranger.pay_in(3 * USD)
    with customer.calling("admin"):
        parts = await answers(ledger.ExportJournal(pb.ExportJournalRequest()))
        rest = await answers(ledger.ExportJournal(pb.ExportJournalRequest(after_position=3)))
        balance = (await mesh.billing.GetBalance(billing_service_pb2.GetBalanceRequest())).balance
    assert [len(part.entries) for part in parts] == [3, 1]
    entries = [entry for part in parts for entry in part.entries]
    assert [entry for part in rest for entry in part.entries] == entries[3:]
    sums = Recomputed()
    assert recompute(entries, sums) is None
    assert sums.organization_id == customer.organization
    assert sums.head == await mesh.pool.fetchval(
        "SELECT hash FROM chains WHERE organization_id = $1", customer.organization
    )
    assert sums.balances["held"] == balance.held_nanos_usd
    assert sums.balances["prepaid"] + sums.balances["receivable"] == balance.available_nanos_usd
    file = tmp_path / "journal.beancount"
    file.write_text("".join(render("acme", entries)), encoding="utf-8")
    checker = await asyncio.create_subprocess_exec(
        BEAN_CHECK, "--no-cache", file, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await checker.communicate()
    assert (checker.returncode, said) == (0, b"")
    with customer.calling("operator", "admin"):
        theirs = pb.ExportJournalRequest(organization=f"organizations/{stranger.organization}")
        (only,) = await answers(ledger.ExportJournal(theirs))
    assert [(entry.kind, entry.organization_id) for entry in only.entries] == [("top_up", stranger.organization)]


def trained(customer: Customer, number: int) -> usage_events_pb2.TrainingUsageRecorded:
    """Usage of a job that has no hold yet."""
    job_id = customer.job(number).rpartition("/")[2]
    return usage_events_pb2.TrainingUsageRecorded(
        work_key=f"{job_id}:train:0-10",
        tuning_job=customer.job(number),
        project_id=customer.project,
        organization_id=customer.organization,
        kind="train",
        start_step=0,
        end_step=10,
        tokens=100,
        usage_time=now(),
    )


async def own_letters(
    customer: Customer, ledger: "LedgerServiceAsyncStub", page_size: int = 1000
) -> list[pb.DeadLetter]:
    found: list[pb.DeadLetter] = []
    request = pb.ListDeadLettersRequest(page_size=page_size)
    with customer.calling("operator", "admin"):
        while True:
            page = await ledger.ListDeadLetters(request)
            assert len(page.dead_letters) <= page_size
            found += page.dead_letters
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
    assert len({letter.event_id for letter in found}) == len(found)
    assert [letter.create_time.ToDatetime() for letter in found] == sorted(
        letter.create_time.ToDatetime() for letter in found
    )
    return [letter for letter in found if customer.organization in letter.event_json]


@pytest.mark.parametrize("page_size", [1, 3, 1000])
async def test_what_cannot_be_booked_is_listed_announced_and_booked_once_its_cause_is_gone(
    customer: Customer, mesh: Mesh, ledger: "LedgerServiceAsyncStub", nats_server: NatsServer, page_size: int
) -> None:
    await customer.pay_in(50 * USD)
    for number in range(1, 6):
        await mesh.publish(trained(customer, number))
    await mesh.until(LETTERS, 5, f"{customer.project}/tuningJobs".encode())
    letters = await own_letters(customer, ledger, page_size)
    assert len(letters) == 5
    letter = letters[0]
    assert (letter.subject, letter.reason, letter.failures) == ("usage.training.recorded", "EVENT_INVALID", 3)
    assert "has no hold" in letter.error
    shown = json.loads(letter.event_json)
    assert (shown["kind"], shown["tokens"]) == ("train", "100")
    announced = [
        EventSetAside.FromString(row["payload"])
        for row in await mesh.pool.fetch("SELECT payload FROM outbox WHERE subject = 'deadletter.event_set_aside'")
    ]
    assert {each.event_id for each in letters} <= {each.event_id for each in announced if each.payload}
    await mesh.until("SELECT count(*) FROM outbox WHERE published_at IS NULL", 0)
    bus = await nats.connect(nats_server.url)
    assert (await bus.jetstream().stream_info("DEADLETTER")).state.messages >= 5
    await bus.close()

    request = pb.ReplayDeadLetterRequest(event_id=letter.event_id)
    with customer.calling("operator", "admin"):
        still = await ledger.ReplayDeadLetter(request)
        assert not still.booked
        assert "has no hold" in still.error
        (kept,) = [each for each in await own_letters(customer, ledger) if each.event_id == letter.event_id]
        assert kept.failures == 4
    number = int(shown["tuning_job"].rpartition("-")[2])
    await customer.hold(number)
    with customer.calling("operator", "admin"):
        assert (await ledger.ReplayDeadLetter(request)).booked
        with pytest.raises(NotFound) as gone:
            await ledger.ReplayDeadLetter(request)
        assert gone.value.reason == "NOT_FOUND"
        assert (await answers(ledger.VerifyLedger(pb.VerifyLedgerRequest())))[-1].usage_record_count == 1
    waiting = await own_letters(customer, ledger)
    assert len(waiting) == 4

    discarding = pb.DiscardDeadLetterRequest(event_id=waiting[0].event_id, reason=" the hold was a test's ")
    with customer.calling("member"), pytest.raises(PermissionDenied):
        await ledger.DiscardDeadLetter(discarding)
    with customer.calling("operator", "admin"):
        for broken in ({"event_id": "x", "reason": "y"}, {"event_id": waiting[0].event_id, "reason": " "}):
            with pytest.raises(InvalidArgument):
                await ledger.DiscardDeadLetter(pb.DiscardDeadLetterRequest(**broken))
        await ledger.DiscardDeadLetter(discarding)
        for again in (
            ledger.DiscardDeadLetter(discarding),
            ledger.ReplayDeadLetter(pb.ReplayDeadLetterRequest(event_id=waiting[0].event_id)),
        ):
            with pytest.raises(NotFound):
                await again
        listed = await ledger.ListDeadLetters(pb.ListDeadLettersRequest(discarded=True, page_size=1000))
        (given_up,) = [each for each in listed.dead_letters if each.event_id == waiting[0].event_id]
        assert (given_up.discarded_by, given_up.discard_reason) == ("key_1", "the hold was a test's")
        assert given_up.HasField("discard_time")
        # What was given up is explained: the books agree with the events.
        assert (await answers(ledger.VerifyLedger(pb.VerifyLedgerRequest())))[-1].done
    assert len(await own_letters(customer, ledger)) == 3


async def test_the_good_calls_of_a_message_are_booked_and_the_bad_ones_set_aside(
    customer: Customer, mesh: Mesh, ledger: "LedgerServiceAsyncStub"
) -> None:
    await mesh.publish(served(customer, ("gen-1", 10), ("gen-2", -5), ("gen-3", 30), ("gen-4", 10**15)))
    await mesh.until("SELECT count(*) FROM usage_records WHERE project_id = $1", 2, customer.project)
    (letter,) = await own_letters(customer, ledger)
    shown = json.loads(letter.event_json)
    assert [record["work_key"].rpartition("-")[2] for record in shown["records"]] == ["2", "4"]
    assert "2 of 4 calls cannot be booked" in letter.error
    with customer.calling("operator", "admin"):
        outcome = await ledger.ReplayDeadLetter(pb.ReplayDeadLetterRequest(event_id=letter.event_id))
    assert not outcome.booked
    assert "input_tokens must be from 0" in outcome.error
    assert await mesh.pool.fetchval("SELECT count(*) FROM usage_records WHERE project_id = $1", customer.project) == 2


@pytest.mark.parametrize("event_id", ["", "nonsense", "6f1f8a54"])
async def test_a_replay_needs_the_id_of_an_event(
    customer: Customer, ledger: "LedgerServiceAsyncStub", event_id: str
) -> None:
    with customer.calling("operator", "admin"), pytest.raises(InvalidArgument) as refused:
        await ledger.ReplayDeadLetter(pb.ReplayDeadLetterRequest(event_id=event_id))
    assert [violation.field for violation in refused.value.violations] == ["event_id"]


@pytest.mark.parametrize("token", ["nonsense", "WyJ4IiwxLCJ4Il0"])
async def test_a_page_token_of_another_list_is_refused(
    customer: Customer, ledger: "LedgerServiceAsyncStub", token: str
) -> None:
    with customer.calling("operator", "admin"), pytest.raises(InvalidArgument) as refused:
        await ledger.ListDeadLetters(pb.ListDeadLettersRequest(page_token=token))
    assert [violation.field for violation in refused.value.violations] == ["page_token"]

"""What a server or a user said stands on the terminal letter by letter: no brackets are taken for markup."""

from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace

import pytest
from google.protobuf.message import Message
from typer.testing import CliRunner

from finemesh.billing.v1 import budget_service_pb2 as budget_pb
from finemesh.billing.v1 import credit_note_pb2, invoice_pb2, ledger_service_pb2_grpc
from finemesh.billing.v1 import ledger_service_pb2 as pb
from finemesh.endpoints.v1 import endpoint_pb2
from finemesh.files.v1 import file_pb2
from finemesh.tuning.v1 import tuning_job_event_pb2, tuning_job_pb2, tuning_service_pb2
from finemesh_client.cli import output
from finemesh_client.cli.billing import budget_commands
from finemesh_client.cli.billing.billing_commands import DOLLARS_MAX, show_invoice, to_nanos
from finemesh_client.cli.datasets import file_commands
from finemesh_client.cli.jobs import job_show, price_terms
from finemesh_client.cli.jobs.job_follow import watch_job
from finemesh_client.cli.main import app
from finemesh_client.cli.models import endpoint_commands
from tests.unit.client.conftest import Serve

# A closing tag that nothing opened, a style, a link and a picture's name.
SAID = "work key '[/x]' [bold]is[/bold] [link=x]booked[/link] :warning: as \\[y]"


class Ledger(ledger_service_pb2_grpc.LedgerServiceServicer):
    def VerifyLedger(self, request: Message, context: object) -> Iterator[pb.VerifyLedgerResponse]:
        yield pb.VerifyLedgerResponse(check=SAID)
        different = pb.LedgerDifference(
            check="c " + SAID, location="l " + SAID, expected="e " + SAID, found="f " + SAID
        )
        yield pb.VerifyLedgerResponse(done=True, difference=different)

    def ListDeadLetters(self, request: Message, context: object) -> pb.ListDeadLettersResponse:
        letter = pb.DeadLetter(event_id="e1", subject="s", reason="EVENT_INVALID", error=SAID)
        return pb.ListDeadLettersResponse(dead_letters=[letter])

    def ReplayDeadLetter(self, request: Message, context: object) -> pb.ReplayDeadLetterResponse:
        return pb.ReplayDeadLetterResponse(error=SAID)

    def DiscardDeadLetter(self, request: pb.DiscardDeadLetterRequest, context: object) -> pb.DiscardDeadLetterResponse:
        assert (request.event_id, request.reason) == ("e1", SAID)
        return pb.DiscardDeadLetterResponse()


@pytest.fixture
def ledger(serve: Serve) -> None:
    serve(Ledger(), ledger_service_pb2_grpc.add_LedgerServiceServicer_to_server)


@pytest.mark.parametrize(
    ("command", "exit_code", "lines"),
    [
        ("verify", 1, [f"c {SAID}: l {SAID}", f"expected e {SAID}", f"found    f {SAID}"]),
        ("dead-letters list", 0, [SAID]),
        ("dead-letters replay --all", 1, [f"e1 {SAID}"]),
    ],
)
@pytest.mark.usefixtures("ledger")
def test_texts_of_events_are_shown_as_they_are(command: str, exit_code: int, lines: list[str]) -> None:
    shown = CliRunner().invoke(app, ["billing", *command.split()], env={"COLUMNS": "400"})
    assert shown.exit_code == exit_code, shown.exception
    for line in lines:
        assert line in shown.stdout


@pytest.mark.usefixtures("ledger")
def test_events_are_discarded_with_a_reason_once_that_is_confirmed() -> None:
    command = ["billing", "dead-letters", "discard", "e1", "--reason", SAID]
    refused = CliRunner().invoke(app, command, input="n\n")
    assert refused.exit_code == 1
    assert "discarded" not in refused.stdout
    done = CliRunner().invoke(app, command, input="y\n")
    assert done.exit_code == 0, done.exception
    assert "e1 discarded" in done.stdout
    assert CliRunner().invoke(app, [*command, "--json"]).exit_code == 2
    assert '"e1"' in CliRunner().invoke(app, [*command, "--json", "--yes"]).stdout


def _budget() -> None:
    budget = budget_pb.Budget(api_key_id=SAID, monthly_cap_nanos_usd=1, capped=True)
    output.table(SAID, budget_commands.COLUMNS, [budget_commands.show(budget)])


@pytest.mark.parametrize(
    "show",
    [
        lambda: output.table(SAID, [SAID], [(SAID,)]),
        lambda: output.fields([("name", SAID)]),
        lambda: output.console.print(f"deleted {SAID}"),
        lambda: file_commands.show(file_pb2.File(display_name=SAID, state=file_pb2.FILE_STATE_INVALID)),
        lambda: endpoint_commands.show(
            endpoint_pb2.Endpoint(status_message=SAID, state=endpoint_pb2.ENDPOINT_STATE_FAILED)
        ),
        lambda: job_show.show_job(
            tuning_job_pb2.TuningJob(error=tuning_job_pb2.JobError(reason="RUN_FAILED", message=SAID))
        ),
        lambda: job_show.show_quote(
            tuning_service_pb2.QuoteTuningJobResponse(terms=[tuning_service_pb2.QuoteTerm(description=SAID)])
        ),
        lambda: show_invoice(
            invoice_pb2.Invoice(
                name=SAID,
                lines=[invoice_pb2.InvoiceLine(description=SAID)],
                credit_notes=[credit_note_pb2.CreditNote(reason=SAID)],
            )
        ),
        _budget,
    ],
    ids=["table", "fields", "line", "file", "endpoint", "job", "quote", "invoice", "budget"],
)
def test_texts_of_a_server_are_shown_as_they_are(
    show: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    show()
    assert SAID in capsys.readouterr().out


async def test_a_job_is_watched_with_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = tuning_job_pb2.QueueStatus(waiting_for=SAID)
    job = tuning_job_pb2.TuningJob(state=tuning_job_pb2.TUNING_JOB_STATE_QUEUED, queue=queue)
    event = tuning_job_event_pb2.TuningJobEvent(message=SAID)

    async def watch(name: str, after_sequence: int) -> AsyncIterator[tuning_service_pb2.WatchTuningJobResponse]:
        yield tuning_service_pb2.WatchTuningJobResponse(tuning_job=job, events=[event])

    monkeypatch.setenv("COLUMNS", "400")
    mesh = SimpleNamespace(jobs=SimpleNamespace(watch=watch))
    assert await watch_job(mesh, "ft-1") == job  # type: ignore[arg-type]
    drawn = capsys.readouterr().err
    assert f"  {SAID}\n" in drawn
    assert f"waiting for {SAID}" in drawn


def test_states_keep_their_colour() -> None:
    assert output.state("JOB_STATE_FAILED", "JOB_STATE_").style == "red"
    assert output.state("JOB_STATE_ODD", "JOB_STATE_").plain == "ODD"


@pytest.mark.parametrize(
    ("amount", "problem"),
    [
        ("inf", "is no amount of dollars"),
        ("-inf", "is no amount of dollars"),
        ("NaN", "is no amount of dollars"),
        ("sNaN", "is no amount of dollars"),
        ("[/x]", "'[/x]' is no amount of dollars"),
        ("1e999999", "must be above 0 and at most 1,000,000,000 dollars"),
        ("1e999999999999", "must be above 0 and at most 1,000,000,000 dollars"),
        ("1e30", "must be above 0 and at most 1,000,000,000 dollars"),
        ("1000000000.000000001", "must be above 0 and at most 1,000,000,000 dollars"),
        ("0", "must be above 0 and at most 1,000,000,000 dollars"),
        ("1e-999999", "at most 9 decimal places"),
        ("0.0000000001", "at most 9 decimal places"),
        ("1.00000000000000000000000000000000000001", "at most 9 decimal places"),
    ],
)
def test_an_amount_that_is_none_is_refused_with_its_reason(amount: str, problem: str) -> None:
    refused = CliRunner().invoke(app, ["billing", "top-up", "--", amount], env={"COLUMNS": "200"})
    assert refused.exit_code == 2, refused.exception
    assert problem in refused.output


def test_amounts_are_exact() -> None:
    assert to_nanos(str(DOLLARS_MAX)) == 10**18
    assert to_nanos("$999999999.999999999") == 10**18 - 1
    assert to_nanos("0.000000001") == 1
    assert to_nanos("25.50" + "0" * 40) == 25_500_000_000


def test_a_total_says_when_it_is_the_minimum() -> None:
    assert price_terms.total(5 * 10**9, True).plain == "total $5.00 (the minimum)"
    assert price_terms.total(5 * 10**9, False).plain == "total $5.00"

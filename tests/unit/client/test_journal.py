"""The client's own recomputation of a journal: it agrees with billing's chain and finds every single change."""

import json
import re
import subprocess
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from finemesh.billing.v1.ledger_service_pb2 import JournalEntry, JournalPosting
from finemesh_client.accounting.journal import (
    JournalUnreadable,
    Recomputed,
    entry_hash,
    read_lines,
    recompute,
    write_line,
)
from finemesh_client.cli.main import app
from services.billing.ledger import chain
from services.billing.ledger.chain import Link
from services.billing.ledger.entries import Account, Posting, Transaction, TransactionKind

DOCS = Path(__file__).parents[3] / "docs/ledger.md"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NOON = datetime(2026, 11, 23, 12, 0, 0, 123_456, tzinfo=UTC)


def transaction(number: int, postings: dict[Account, int], *, moment: datetime = NOON) -> Transaction:
    return Transaction(
        id=uuid.uuid5(uuid.NAMESPACE_URL, str(number)),
        kind=TransactionKind.TOP_UP,
        organization_id="acme",
        resource="organizations/acme",
        price_book_version="",
        transaction_time=moment,
        postings=tuple(Posting(account=account, amount_nanos_usd=amount) for account, amount in postings.items()),
    )


def journal(transactions: list[Transaction]) -> list[JournalEntry]:
    """What billing exports of these, sealed by billing's own chain."""
    entries = []
    for sealed, link in zip(transactions, chain.links(Link(), transactions), strict=True):
        entry = JournalEntry(
            transaction_id=str(sealed.id),
            position=link.position,
            kind=sealed.kind,
            organization_id=sealed.organization_id,
            resource=sealed.resource,
            price_book_version=sealed.price_book_version,
            postings=[
                JournalPosting(account=posting.account, amount_nanos_usd=posting.amount_nanos_usd)
                for posting in sealed.postings
            ],
            hash=link.hash.hex(),
        )
        entry.transaction_time.FromDatetime(sealed.transaction_time)
        entries.append(entry)
    return entries


def sample() -> list[JournalEntry]:
    return journal(
        [
            transaction(1, {Account.FUNDING: -5_000_000_001, Account.PREPAID: 5_000_000_001}),
            transaction(2, {Account.PREPAID: -4_000_000_000, Account.HELD: 4_000_000_000}),
            transaction(
                3, {Account.HELD: -4_000_000_000, Account.REVENUE: 1_000_000_000, Account.PREPAID: 3_000_000_000}
            ),
        ]
    )


amounts = st.integers(min_value=1, max_value=10**18)
moments = st.integers(min_value=0, max_value=4 * 10**15).map(lambda micros: EPOCH + timedelta(microseconds=micros))


@given(st.lists(st.tuples(amounts, moments), min_size=1, max_size=20))
def test_billing_and_client_compute_the_same_chain(plan: list[tuple[int, datetime]]) -> None:
    entries = journal(
        [
            transaction(number, {Account.PREPAID: amount, Account.FUNDING: -amount}, moment=moment)
            for number, (amount, moment) in enumerate(plan)
        ]
    )
    sums = Recomputed()
    assert recompute(entries, sums) is None
    assert (sums.organization_id, sums.entry_count, sums.head.hex()) == ("acme", len(plan), entries[-1].hash)
    total = sum(amount for amount, _ in plan)
    assert sums.balances == {"funding": -total, "prepaid": total}
    again = Recomputed()
    assert recompute(read_lines(map(write_line, entries)), again) is None
    assert again == sums


def changed(entries: list[JournalEntry], index: int, **changes: object) -> list[JournalEntry]:
    for name, value in changes.items():
        setattr(entries[index], name, value)
    return entries


def moved(index: int, account: int, nanos_usd: int) -> list[JournalEntry]:
    entries = sample()
    entries[index].postings[account].amount_nanos_usd += nanos_usd
    return entries


def balanced_change(index: int) -> list[JournalEntry]:
    entries = moved(index, 0, 1)
    entries[index].postings[1].amount_nanos_usd -= 1
    return entries


def later(index: int) -> list[JournalEntry]:
    entries = sample()
    entries[index].transaction_time.nanos += 1000
    return entries


def without_postings(index: int, count: int) -> list[JournalEntry]:
    entries = sample()
    del entries[index].postings[:count]
    return entries


def doubled_account() -> list[JournalEntry]:
    entries = sample()
    entries[0].postings[1].account = entries[0].postings[0].account
    return entries


def overdrawn() -> list[JournalEntry]:
    return journal([transaction(1, {Account.PREPAID: -5, Account.HELD: 5})])


@pytest.mark.parametrize(
    ("entries", "check", "place"),
    [
        (changed(sample(), 1, resource="organizations/other"), "hash chain", "transaction 2 "),
        (changed(sample(), 1, kind="release"), "hash chain", "transaction 2 "),
        (changed(sample(), 1, price_book_version="cheap"), "hash chain", "transaction 2 "),
        (changed(sample(), 0, transaction_id=str(uuid.uuid4())), "hash chain", "transaction 1 "),
        (changed(sample(), 2, hash="00" * 32), "hash chain", "transaction 3 "),
        (changed(sample(), 2, organization_id="other"), "organization", "transaction 3 "),
        (later(1), "hash chain", "transaction 2 "),
        (balanced_change(1), "hash chain", "transaction 2 "),
        (moved(1, 0, 1), "sum of postings", "transaction 2 "),
        (without_postings(1, 1), "postings", "transaction 2 "),
        (without_postings(1, 2), "postings", "transaction 2 "),
        (doubled_account(), "postings", "transaction 1 "),
        (sample()[1:], "position", "transaction 2 "),
        (sample()[:1] + sample()[2:], "position", "transaction 3 "),
        ([sample()[0], *sample()], "position", "transaction 1 "),
        (overdrawn(), "balance", "prepaid"),
    ],
)
def test_each_change_is_named(entries: list[JournalEntry], check: str, place: str) -> None:
    different = recompute(entries, Recomputed())
    assert different is not None
    assert (different.check, different.location[: len(place)]) == (check, place)
    assert different.expected != different.found


def test_a_debt_and_funding_may_be_below_zero_and_never_above() -> None:
    owed = journal([transaction(1, {Account.RECEIVABLE: -5, Account.REVENUE: 5})])
    assert recompute(owed, Recomputed()) is None
    credit = journal([transaction(1, {Account.RECEIVABLE: 5, Account.FUNDING: -5})])
    different = recompute(credit, Recomputed())
    assert different is not None
    assert (different.check, different.location) == ("balance", "receivable")


def test_a_line_that_is_no_entry_is_named_by_its_number() -> None:
    lines = [write_line(sample()[0]), "\n", "{}x\n"]
    with pytest.raises(JournalUnreadable, match="line 3"):
        list(read_lines(lines))


def test_the_example_of_the_documentation_is_computed() -> None:
    """Whoever writes a checker of their own can compare with it."""
    text = DOCS.read_text(encoding="utf-8")
    example = re.search(r"```json\n(\{\"transaction_id\".*?\})\n```\n\n```sh\n(.*?)\n```", text, re.DOTALL)
    assert example is not None
    (entry,) = read_lines([json.dumps(json.loads(example.group(1)))])
    assert recompute([entry], Recomputed()) is None
    assert entry_hash(bytes(32), entry).hex() == entry.hash
    told = subprocess.run(["bash", "-c", example.group(2)], capture_output=True, text=True, check=True).stdout
    assert told.split()[0] == entry.hash


def test_a_file_is_verified_without_a_server(tmp_path: Path) -> None:
    runner, file = CliRunner(), tmp_path / "journal.jsonl"
    file.write_text("".join(map(write_line, sample())), encoding="utf-8")
    good = runner.invoke(app, ["billing", "verify", "--offline", str(file)])
    assert good.exit_code == 0, good.output
    assert "ledger ok: 3 transactions" in good.output
    assert "prepaid $4.000000001" in good.output
    file.write_text("".join(map(write_line, balanced_change(1))), encoding="utf-8")
    bad = runner.invoke(app, ["billing", "verify", "--offline", str(file)])
    assert bad.exit_code == 1
    assert "hash chain: transaction 2" in bad.output
    told = json.loads(runner.invoke(app, ["billing", "verify", "--offline", str(file), "--json"]).output)
    assert told["difference"]["check"] == "hash chain"
    file.write_text("nonsense", encoding="utf-8")
    unreadable = runner.invoke(app, ["billing", "verify", "--offline", str(file)])
    assert unreadable.exit_code == 2
    assert "line 1" in unreadable.output

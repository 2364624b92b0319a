"""Single corruptions of a world that agrees, and what verification then says. Plain data: `test_verification.py` makes
the world and runs them.
"""
# ruff: noqa: S608

from typing import NamedTuple

from tests.store.billing.full_world import DONE, FAILED, FORGOTTEN, FREED, LATE, OPEN, STOPPED


class Corruption(NamedTuple):
    """`location` is how the place begins; `expected` and `found` are parts of what is said."""

    sql: str
    check: str
    location: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.check}: {self.sql}"


def _update(table: str, change: str, where: str) -> str:
    return f"UPDATE {table} SET {change} WHERE {where}"


def _delete(table: str, where: str) -> str:
    return f"DELETE FROM {table} WHERE {where}"


JOBS = "projects/a-p/tuningJobs/"
X = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"


def _chain(sql: str, location: str, expected: str, found: str) -> Corruption:
    return Corruption(sql, "hash chain", f"organizations/{location}", expected, found)


def _entry(change: str, expected: str, found: str, check: str = "hash chain") -> Corruption:
    sql = _update("transactions", change, ENTRY)
    return Corruption(sql, check, "organizations/a transaction 2", expected, found)


def _postings(sql: str, expected: str, found: str) -> Corruption:
    return Corruption(sql, "postings", "organizations/a transaction 2", expected, found)


def _hold(job: str, change: str, expected: str, found: str) -> Corruption:
    sql = _update("holds", change, f"resource = '{JOBS}{job}'")
    return Corruption(sql, "holds", f"organizations/a hold of {JOBS}{job}", expected, found)


def _ending(job: str, sql: str, expected: str, found: str) -> Corruption:
    return Corruption(sql, "holds", f"organizations/a hold of {JOBS}{job}", expected, found)


def _trained(change: str, expected: str, found: str) -> Corruption:
    sql = _update("usage_records", change, f"{TRAINED} AND resource = '{JOBS}{STOPPED}'")
    return Corruption(sql, "holds", "organizations/a projects/a-p usage record ft-3:train:20-40", expected, found)


def _served(
    change: str, expected: str, found: str, location: str = "projects/a-p usage record gen-1:input"
) -> Corruption:
    sql = _update("usage_records", change, "work_key = 'gen-1:input' AND organization_id = 'a'")
    return Corruption(sql, "usage", f"organizations/a {location}", expected, found)


def _sum(sql: str, expected: str, found: str, month: str = "2026-11-01") -> Corruption:
    return Corruption(sql, "usage sums", f"organizations/b {month} b-p 2026-11-23 ", expected, found)


ENTRY = "organization_id = 'a' AND position = 2"
TRAINED = "work_key = 'ft-3:train:20-40'"
OUTPUT = "kind = 'output_tokens' AND organization_id = 'b'"
SUMMED = "quantity 27, amount_nanos_usd 2700, record_count 2"

CHAIN = [
    _entry("resource = 'x'", "", ""),
    _entry("id = '00000000-0000-0000-0000-000000000001'", "", ""),
    _entry("price_book_version = 'cheap'", "", ""),
    _entry("transaction_time = transaction_time + interval '1 microsecond'", "", ""),
    _entry("hash = sha256('x')", "", X),
    _chain(
        f"{_delete('transactions', ENTRY)}; {_delete('postings', ENTRY)}",
        "a transaction 3",
        "position 2",
        "position 3",
    ),
    _chain(_update("chains", "hash = sha256('x')", "organization_id = 'b'"), "b head", "", X),
    _chain(_update("chains", "position = 17", "organization_id = 'b'"), "b head", "position 16", "position 17"),
    _chain(_update("chains", "posted_position = 9", "organization_id = 'b'"), "b head", "position 16", "position 9"),
    _chain(_delete("chains", "organization_id = 'b'"), "b head", "position 16", "no chain"),
    _chain("INSERT INTO chains VALUES ('ghost', 3)", "ghost head", "position 0", "position 3"),
    _chain("INSERT INTO accounts VALUES ('ghost', 'prepaid', 5)", "ghost head", "position 0", "no chain"),
]
POSTINGS = [
    Corruption(
        _update("transactions", "position = 99", "organization_id = 'b' AND position = 15"),
        "postings",
        "organizations/b transaction 15",
        "a transaction",
        "postings alone: receivable -1000000, revenue 1000000",
    ),
    _postings(
        _update("postings", "amount_nanos_usd = amount_nanos_usd + 1", f"{ENTRY} AND account = 'held'"),
        "a sum of 0",
        "a sum of 1",
    ),
    _postings(_delete("postings", ENTRY), "at least two", "0"),
    _postings(
        _delete("transactions", ENTRY), "a transaction", "postings alone: held 14030000000, prepaid -14030000000"
    ),
    _postings(
        _update("postings", "account = 'revenue'", f"{ENTRY} AND account = 'held'"),
        "hold: prepaid -, held +",
        "revenue 14030000000",
    ),
    _postings(
        _update("postings", "amount_nanos_usd = -amount_nanos_usd", ENTRY),
        "hold: prepaid -, held +",
        "held -14030000000",
    ),
    _postings(
        "ALTER TABLE transactions DROP CONSTRAINT transactions_kind_check;"
        + _update("transactions", "kind = 'gift'", ENTRY),
        "one of top_up",
        "gift",
    ),
]
BALANCES = [
    Corruption(
        _update("accounts", "balance_nanos_usd = 7", "(organization_id, account) = ('a', 'held')"),
        "balances",
        "organizations/a account held",
        "5000000000",
        "7",
    ),
    Corruption(
        _delete("accounts", "(organization_id, account) = ('b', 'funding')"),
        "balances",
        "organizations/b account funding",
        "-100000000000",
        "nothing",
    ),
]
HOLDS = [
    _hold(OPEN, "held_nanos_usd = held_nanos_usd + 1", "held 5000000000", "held 5000000001"),
    _hold(DONE, "epochs = 3", "held 21045000000", "held 14030000000"),
    _hold(DONE, "price_book_version = 'together-2026'", "held ", "held 14030000000"),
    _hold(DONE, "price_book_version = 'lost'", "a price book that is stored", "lost"),
    _hold(DONE, "base_model = 'nobody/nothing'", "a model and a method with a price", ""),
    _hold(DONE, "id = 'hold_x'", "id hold_", "id hold_x"),
    _hold(STOPPED, "charged_nanos_usd = 1", "charged 610000000", "charged 1"),
    _hold(FREED, "charged_nanos_usd = 1", "charged 0", "charged 1"),
    _hold(FAILED, "adjustment_nanos_usd = -1", "adjustment -244000000", "adjustment -1"),
    _hold(DONE, "minimum_applied = true", "minimum applied False", "minimum applied True"),
    _hold(DONE, "billed_tokens = 1", "billed tokens 2300000", "billed tokens 1"),
    _hold(DONE, "billing_month = '2026-10-01'", "billing month 2026-11", "billing month 2026-10"),
    _hold(DONE, "end_time = end_time + interval '1 s'", "end time", "end time"),
    _hold(
        OPEN,
        "state = 'expired', end_time = hold_time, adjustment_nanos_usd = -122000000",
        "a transaction release",
        "nothing",
    ),
    _hold(LATE, "discrepancy = ''", "16 usage records", "5 usage records"),
    _hold(FREED, "adjustment_nanos_usd = 1", "adjustment 0 because it is released", "adjustment 1"),
    _hold(FREED, "discrepancy = 'odd'", "discrepancy ", "discrepancy odd"),
    _hold(FORGOTTEN, "adjustment_nanos_usd = 0", "adjustment -122000000 because it is expired", "adjustment 0"),
    _hold(OPEN, "minimum_applied = true", "minimum applied False", "minimum applied True"),
    _hold(OPEN, "billed_tokens = 5", "billed tokens 0", "billed tokens 5"),
    _ending(
        FREED,
        "INSERT INTO usage_records SELECT 'ft-4:train:0-20', kind, organization_id, project_id,"
        f" '{JOBS}{FREED}', model, quantity, unit_price_nanos_usd, amount_nanos_usd, price_book_version, start_step,"
        " end_step, usage_time, api_key_id, billing_month, transaction_id"
        f" FROM usage_records WHERE work_key = 'ft-2:train:0-20' AND project_id = 'a-p'",
        "no usage records, because it was released",
        "1 usage records",
    ),
    _ending(
        STOPPED,
        _update("job_endings", "project_id = 'b-p'", f"resource = '{JOBS}{STOPPED}'"),
        "an ending of a in a-p",
        "an ending of a in b-p",
    ),
    _ending(
        STOPPED,
        _update("job_endings", "ending = 'cancelled_before_run'", f"resource = '{JOBS}{STOPPED}'"),
        "charged 0",
        "charged 610000000",
    ),
    _ending(
        STOPPED,
        _update("job_endings", "usage_record_count = 20", f"resource = '{JOBS}{STOPPED}'"),
        "20 usage records",
        "5 usage records",
    ),
    _ending(STOPPED, _delete("job_endings", f"resource = '{JOBS}{STOPPED}'"), "the ending that settled it", "nothing"),
    _ending(
        OPEN,
        f"INSERT INTO job_endings VALUES ('{JOBS}{OPEN}', 'a', 'a-p', 'user_failure', 1, '2026-11-23')",
        "settled: it ended as user_failure",
        "held",
    ),
    _ending(STOPPED, _delete("usage_records", f"{TRAINED} AND project_id = 'a-p'"), "charged 488000000", "charged 61"),
    Corruption(
        _update("holds", "state = 'held', end_time = NULL", f"resource = '{JOBS}{FREED}'"),
        "holds",
        "organizations/a transaction 8",
        "no such entry: the hold is held",
        "release",
    ),
    Corruption(
        _delete("holds", f"resource = '{JOBS}{FREED}'"),
        "holds",
        "organizations/a transaction 7",
        f"a hold of {JOBS}{FREED}",
        "nothing",
    ),
    Corruption(
        _delete("holds", f"resource = '{JOBS}{OPEN}'"),
        "holds",
        "organizations/a projects/a-p usage record ft-2:train:0-20",
        f"a hold of {JOBS}{OPEN}",
        "nothing",
    ),
    Corruption(
        _delete("holds", "resource = 'projects/b-p/tuningJobs/ft-5'"),
        "holds",
        "organizations/b projects/b-p usage record ft-5:train:0-40",
        "a hold of projects/b-p/tuningJobs/ft-5",
        "nothing",
    ),
    _trained("amount_nanos_usd = 0", "amount 122000000", "amount 0"),
    _trained("unit_price_nanos_usd = 1", "unit price 6100000000", "unit price 1"),
    _trained("model = 'x'", "model meta-llama/Llama-3.1-8B", "model x"),
    _trained("organization_id = 'c'", "organization a", "organization c")._replace(
        location="organizations/c projects/a-p usage record ft-3:train:20-40"
    ),
    _trained("project_id = 'c-p'", "project a-p", "project c-p")._replace(
        location="organizations/a projects/c-p usage record ft-3:train:20-40"
    ),
    _trained("start_step = 10", "work key ft-3:train:10-40", "work key ft-3:train:20-40"),
    _trained("start_step = 10, work_key = 'ft-3:train:10-40'", "steps from 20 on", "steps from 10 on")._replace(
        location="organizations/a projects/a-p usage record ft-3:train:10-40"
    ),
    _trained("work_key = 'ft-3:train:20-40:2'", "work key ft-3:train:20-40", "work key ft-3:train:20-40:2"),
    _trained("api_key_id = 'k'", "API key ", "API key k"),
    _trained("billing_month = '2026-10-01'", "billing month 2026-11-01", "billing month 2026-10-01"),
    _trained("transaction_id = '00000000-0000-0000-0000-000000000001'", "entry None", "entry 00000000"),
]
USAGE = [
    _served("amount_nanos_usd = 7", "amount 50000", "amount 7"),
    _served("quantity = 2000, amount_nanos_usd = 100000", "revenue 102700", "revenue 52700", "transaction 11"),
    _served("unit_price_nanos_usd = 0, amount_nanos_usd = 0", "unit price 50000000", "unit price 0"),
    _served("price_book_version = 'lost'", "a price book that is stored", "lost"),
    _served("price_book_version = 'default-2026-1'", "use before 2026-11-01", "use at 2026-11-23"),
    _served("model = 'nobody/nothing'", "unit price 200000000", "unit price 50000000"),
    _served("billing_month = '2026-10-01'", "billing month 2026-11", "billing month 2026-10"),
    _served("usage_time = '2020-02-02', billing_month = '2020-02-01'", "use from 20", "use at 2020-02-02"),
    _served("usage_time = usage_time + interval '1 s'", "time 2026-11-23", "time 2026-11-23", "transaction 11"),
    _served("work_key = 'gen-9:input'", "id ", "id ", "transaction 11"),
    _served("work_key = 'gen-1'", "a work key that ends in :input", "gen-1", "projects/a-p usage record gen-1"),
    _served("start_step = 1, end_step = 2", "no steps", "steps 1 to 2"),
    _served("api_key_id = 'k'", "the owner of", "another one in one entry", "projects/a-p usage record gen-"),
    Corruption(
        _update("usage_records", "work_key = 'ep_2:7:0'", "work_key = 'ep_1:7:0' AND project_id = 'b-p'"),
        "usage",
        "organizations/b projects/b-p usage record ep_2:7:0",
        "a work key of one of the endpoints of the project",
        "ep_2:7:0",
    ),
    _served("resource = 'acme/third'", "the owner of", "another one in one entry", "projects/a-p usage record gen-"),
    _served("transaction_id = NULL", "an entry that posts it", "none"),
    _served("transaction_id = '00000000-0000-0000-0000-000000000001'", "transaction 00000000", "nothing"),
    _served(
        "transaction_id = 'ffffffff-ffff-ffff-ffff-ffffffffffff'", "revenue 2700", "revenue 52700", "transaction 11"
    ),
    Corruption(
        _delete("usage_records", "work_key = 'ep_1:7:0' AND project_id = 'b-p'"),
        "usage",
        "organizations/b transaction 14",
        "usage records of",
        "none",
    ),
    Corruption(
        _update("usage_records", "model = 'abacus'", "work_key = 'ep_1:7:0' AND project_id = 'b-p'"),
        "usage",
        "organizations/b projects/b-p usage record ep_1:7:0",
        "a model or hardware with a price",
        "abacus",
    ),
    Corruption(
        "ALTER TABLE usage_records DROP CONSTRAINT usage_records_kind_check;"
        + _update("usage_records", "kind = 'wishes'", "work_key = 'gen-1:input' AND organization_id = 'a'"),
        "usage",
        "organizations/a projects/a-p usage record gen-1:input",
        "a model or hardware with a price",
        "nothing is served as 'wishes'",
    ),
]
SUMS = [
    _sum(_update("usage_sums", "quantity = 28", OUTPUT), SUMMED, "quantity 28, amount_nanos_usd 2700, record_count 2"),
    _sum(
        _update("usage_sums", "amount_nanos_usd = 1", OUTPUT), SUMMED, "quantity 27, amount_nanos_usd 1, record_count 2"
    ),
    _sum(
        _update("usage_sums", "record_count = 3", OUTPUT), SUMMED, "quantity 27, amount_nanos_usd 2700, record_count 3"
    ),
    _sum(_update("usage_sums", "api_key_id = 'k'", OUTPUT), SUMMED, "nothing"),
    _sum(_delete("usage_sums", OUTPUT), SUMMED, "nothing"),
    _sum(_update("usage_sums", "billing_month = '2026-10-01'", OUTPUT), "nothing", SUMMED, "2026-10-01"),
    # Nothing else follows from a record of a job that has not ended.
    _sum(_delete("usage_records", "work_key = 'ft-2:train:0-20' AND project_id = 'b-p'"), "nothing", "quantity 20000,"),
]
BOOKS = [
    Corruption(
        _update("price_books", "source = 'nonsense'", "version = 'together-2026'"),
        "price books",
        "price book together-2026",
        "a price book",
        "stored price book together-2026, line 1",
    ),
    Corruption(
        _update("price_books", "source = replace(source, 'version: together-2026', 'version: cheap')", "true"),
        "price books",
        "price book together-2026",
        "together-2026",
        "cheap",
    ),
    _hold(DONE, "epochs = epochs", "held 14260000000", "held 14030000000")._replace(
        sql=_update("price_books", "source = replace(source, 'sft_lora: 6.10', 'sft_lora: 6.20')", "true")
    ),
]
_UNGUARDED = "ALTER TABLE invoices DROP CONSTRAINT content_matches_digest;"
INVOICE = "organizations/a/invoices/2026-11 (FM-000001)"
DOCUMENTS = [
    Corruption(_UNGUARDED + "UPDATE invoices SET sha256 = sha256('x')", "invoices", INVOICE, "", X),
    Corruption("UPDATE invoices SET content = 'x', sha256 = sha256('x')", "invoices", INVOICE, "an invoice", "Decode"),
    Corruption("UPDATE invoices SET total_nanos_usd = 5", "invoices", INVOICE, "total ", "total 5"),
    Corruption(
        "UPDATE invoices SET number = 7",
        "invoices",
        "organizations/a/invoices/2026-11 (FM-000007)",
        "number FM-000007",
        "number FM-000001",
    ),
    Corruption(
        "UPDATE invoices SET close_time = close_time + interval '1 s'",
        "invoices",
        INVOICE,
        "close time 2026-12-05 00:00:01",
        "close time 2026-12-05 00:00:00",
    ),
    Corruption(
        "UPDATE invoices SET billing_month = '2026-12-01'",
        "usage",
        "organizations/a projects/a-p usage record gen-late",
        "billing month 2026-11",
        "billing month 2026-12",
    ),
    # It could have been booked after the close; but it was on the invoice.
    _hold(DONE, "billing_month = '2026-12-01'", "lines 7", "lines 8")._replace(check="invoices", location=INVOICE),
    Corruption(
        "UPDATE credit_notes SET amount_nanos_usd = 7 WHERE number = 2",
        "credit notes",
        "organizations/b CN-000002",
        "amount 1000000000",
        "amount 7",
    ),
    Corruption(
        "UPDATE credit_notes SET request_id = 'x' WHERE number = 1",
        "credit notes",
        "organizations/a CN-000001",
        "id ",
        "id ",
    ),
    Corruption(
        "UPDATE credit_notes SET resource = 'x' WHERE number = 1",
        "credit notes",
        "organizations/a CN-000001",
        "resource x",
        "resource organizations/a",
    ),
    Corruption(
        "UPDATE credit_notes SET create_time = create_time - interval '1 s' WHERE number = 1",
        "credit notes",
        "organizations/a CN-000001",
        "time 2026-12-04 23:59:59",
        "time 2026-12-05 00:00:00",
    ),
    Corruption(
        "UPDATE credit_notes SET billing_month = '2027-01-01' WHERE number = 1",
        "credit notes",
        "organizations/a CN-000001",
        "billing month 2026-12",
        "billing month 2027-01",
    ),
    Corruption(
        "UPDATE credit_notes SET invoice = 'organizations/a/invoices/2026-10' WHERE number = 1",
        "credit notes",
        "organizations/a CN-000001",
        "a closed invoice",
        "organizations/a/invoices/2026-10",
    ),
    Corruption(
        "UPDATE credit_notes SET invoice = 'organizations/a/invoices/2026-11' WHERE number = 2",
        "credit notes",
        "organizations/b CN-000002",
        "a closed invoice of the organization",
        "organizations/a/invoices/2026-11",
    ),
    Corruption(
        "UPDATE credit_notes SET transaction_id = '00000000-0000-0000-0000-000000000001' WHERE number = 1",
        "credit notes",
        "organizations/a CN-000001",
        "transaction 00000000",
        "nothing",
    ),
    Corruption(
        "DELETE FROM credit_notes WHERE number = 2", "credit notes", "organizations/b transaction ", "a credit", "no"
    ),
    Corruption(
        "UPDATE credit_notes SET number = 9 WHERE number = 2", "document numbers", "credit_note", "number 2", "number 9"
    ),
    Corruption(
        "UPDATE document_numbers SET last_number = 5 WHERE kind = 'invoice'",
        "document numbers",
        "invoice",
        "last number 1",
        "5",
    ),
]
EVERYTHING = (*CHAIN, *POSTINGS, *BALANCES, *HOLDS, *USAGE, *SUMS, *BOOKS, *DOCUMENTS)

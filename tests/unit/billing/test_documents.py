"""Invoices as documents: the same bytes each time, every text printed as text, and figures
that a spreadsheet can add."""

import csv
import io
from decimal import Decimal

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from pypdf import PdfReader

from finemesh.billing.v1 import credit_note_pb2, invoice_pb2
from services.billing.invoices.documents.csv_file import HEADER, dollars, text, to_csv
from services.billing.invoices.documents.page import to_html
from services.billing.invoices.documents.pdf import to_pdf
from services.billing.invoices.documents.sheet import amount, sheet_of

CENT = 10**7
USD = 10**9

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
amounts = st.integers(-(10**9), 10**9).map(lambda cents: cents * CENT)


def moment(text: str) -> Timestamp:
    value = Timestamp()
    value.FromJsonString(text)
    return value


def line(number: int = 1, **changes: object) -> invoice_pb2.InvoiceLine:
    made = invoice_pb2.InvoiceLine(
        description=f"Tuning of meta-llama/Llama-3.1-8B, job ft-{number}",
        resource=f"projects/p/tuningJobs/ft-{number}",
        kind="tuning",
        quantity=60_000_000,
        unit="tokens",
        unit_price_nanos_usd=6_100_000_000,
        exact_nanos_usd=366 * USD,
        amount_nanos_usd=366 * USD,
        price_book_version="default-2026-1",
        usage_record_count=120,
        project_id="p",
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def invoice(
    *lines: invoice_pb2.InvoiceLine, closed: bool = True, note: str = "", name: str = "Acme"
) -> invoice_pb2.Invoice:
    made = invoice_pb2.Invoice(
        name="organizations/acme/invoices/2026-10",
        period_start_time=moment("2026-10-01T00:00:00Z"),
        period_end_time=moment("2026-11-01T00:00:00Z"),
        lines=lines,
        total_nanos_usd=sum(each.amount_nanos_usd for each in lines),
        open=not closed,
        issuer=invoice_pb2.BillingParty(legal_name="Mesh Operators Ltd", address_lines=["1 Mill Lane"], tax_id="GB1"),
        customer=invoice_pb2.BillingParty(legal_name=name),
        tax_note="No tax is charged.",
    )
    if closed:
        made.number, made.sha256 = "FM-000042", "ab" * 32
        made.close_time.CopyFrom(moment("2026-11-04T00:10:00Z"))
    if note:
        given_back = credit_note_pb2.CreditNote(number="CN-000007", amount_nanos_usd=5_005_000_000, reason=note)
        given_back.create_time.CopyFrom(moment("2026-10-15T10:00:00Z"))
        made.credit_notes.append(given_back)
        made.total_nanos_usd -= 5 * USD
    return made


def pages(document: bytes) -> list[str]:
    return [page.extract_text() for page in PdfReader(io.BytesIO(document), strict=True).pages]


def table(document: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(document.decode(), newline="")))


def test_every_document_says_what_an_invoice_must_say() -> None:
    sheet = sheet_of(invoice(line(), note="we were slow"))
    html, pdf = to_html(sheet).decode(), " ".join("\n".join(pages(to_pdf(sheet))).split())
    for wanted in (
        *("FM-000042", "2026-11-04", "2026-10-01 to 2026-10-31 (UTC)", "USD", "organizations/acme"),
        *("Mesh Operators Ltd", "1 Mill Lane", "Tax id GB1", "Acme"),
        *("60,000,000 tokens", "6.10 per 1M tokens", "366.00", "default-2026-1", "120 usage records"),
        *("Credit note CN-000007: we were slow", "-5.00", "Subtotal", "361.00"),
        *("No tax is charged.", "Paid from prepaid credit; nothing is due.", "finemesh billing verify", "ab" * 32),
    ):
        assert wanted in html, wanted
        assert wanted in pdf, wanted
    assert "Page 1 of 1" in pdf


def test_an_open_invoice_says_that_it_is_not_final() -> None:
    sheet = sheet_of(invoice(closed=False))
    assert "open, not final" in to_html(sheet).decode()
    text_of_pages = "\n".join(pages(to_pdf(sheet)))
    assert "open, not final" in text_of_pages
    assert "No charges in this period." in text_of_pages
    assert "FM-" not in text_of_pages


def test_what_the_credit_did_not_cover_is_said() -> None:
    owing = invoice(line())
    owing.owed_nanos_usd = 12_345_000_000
    assert "did not cover 12.345 USD" in to_html(sheet_of(owing)).decode()


def test_a_closed_invoice_is_the_same_bytes_each_time() -> None:
    made = invoice(line(), line(2), note="because")
    again = invoice_pb2.Invoice.FromString(made.SerializeToString())
    assert to_pdf(sheet_of(made)) == to_pdf(sheet_of(again))
    assert to_html(sheet_of(made)) == to_html(sheet_of(again))
    assert to_csv(made) == to_csv(again)
    found = PdfReader(io.BytesIO(to_pdf(sheet_of(made)))).metadata
    assert found is not None
    created: object = found["/CreationDate"]
    assert created == "D:20261104001000Z"


def test_a_long_invoice_breaks_over_numbered_pages_with_the_heads_repeated() -> None:
    found = pages(to_pdf(sheet_of(invoice(*(line(number) for number in range(1, 701))))))
    assert len(found) > 20
    for number, page in enumerate(found, start=1):
        assert f"Page {number} of {len(found)}" in page
        assert "Invoice FM-000042" in page
    assert all("DESCRIPTION" in page for page in found[:-1])
    everything = "\n".join(found)
    assert all(f"job ft-{number}\n" in everything for number in range(1, 701))


@pytest.mark.parametrize(
    "name",
    [
        "Zażółć Gęślą Jaźń sp. z o.o.",
        "北京智能科技有限公司",
        "株式会社カタカナ",
        "서울 주식회사",
        "ООО Ромашка",
        "Ωμέγα",
    ],
)
def test_names_of_the_world_are_printed(name: str) -> None:
    sheet = sheet_of(invoice(line(), name=name))
    assert name in "\n".join(pages(to_pdf(sheet)))
    assert name in to_html(sheet).decode()


def test_what_is_as_long_as_it_may_be_still_fits() -> None:
    wide = "\N{CJK UNIFIED IDEOGRAPH-5317}" * 200
    made = invoice(
        line(
            description=wide,
            resource="x" * 512,
            quantity=10**14,
            unit_price_nanos_usd=10**18 - 1,
            amount_nanos_usd=10**18 - 1,
            exact_nanos_usd=10**18 - 1,
        ),
        note=wide,
        name=wide,
    )
    for party in (made.issuer, made.customer):
        party.MergeFrom(invoice_pb2.BillingParty(address_lines=[wide] * 10, tax_id=wide, email="e" * 200))
    found = pages(to_pdf(sheet_of(made)))
    assert len(found) > 1
    everything = "\n".join(found)
    assert "100,000,000,000,000" in everything
    # Dollars and their fraction are on lines of their own.
    assert {"999,999,999", ".999999999"} <= set(everything.split())
    assert "Page 1 of" in found[0]


def test_letters_without_a_font_leave_a_mark() -> None:
    found = "\n".join(pages(to_pdf(sheet_of(invoice(line(), name="Acme \N{GRINNING FACE} \N{CUNEIFORM SIGN A}")))))
    assert "Acme \N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}" in found


@settings(max_examples=30, deadline=None)
@given(words, words)
def test_no_text_breaks_a_document(name: str, reason: str) -> None:
    made = invoice(line(description=name), note=reason or "x", name=name)
    assert pages(to_pdf(sheet_of(made)))
    assert to_html(sheet_of(made)).decode().startswith("<!DOCTYPE html>")


def test_html_escapes_every_text() -> None:
    evil = "<script>alert(1)</script>\"'&"
    made = invoice(line(description=evil, resource=evil), note=evil, name=evil)
    made.customer.address_lines.append(evil)
    html = to_html(sheet_of(made)).decode()
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;") == 5
    # Nothing is fetched, and nothing could be.
    assert "default-src 'none'" in html
    assert "http://" not in html
    assert "https://" not in html


@given(st.lists(st.tuples(words, amounts), max_size=8))
def test_csv_reads_back_and_adds_up(rows: list[tuple[str, int]]) -> None:
    lines = [line(description=words_, amount_nanos_usd=value, exact_nanos_usd=value) for words_, value in rows]
    made = invoice(*lines, note="because")
    read = table(to_csv(made))
    assert [row["row"] for row in read] == ["line"] * len(rows) + ["credit_note", "total"]
    assert [row["description"] for row in read[:-2]] == [text(words_) for words_, _ in rows]
    parts = sum(Decimal(row["amount"]) for row in read[:-1])
    assert parts == Decimal(read[-1]["amount"]) == Decimal(made.total_nanos_usd) / USD
    assert all(set(row) == set(HEADER) for row in read)


def test_csv_has_the_line_ends_of_its_standard() -> None:
    document = to_csv(invoice(line(), line(2), note="because"))
    assert document.endswith(b"\r\n")
    assert document.count(b"\r\n") == document.count(b"\n") == 5


@pytest.mark.parametrize(
    "start",
    [
        "=",
        "+",
        "-",
        "@",
        "\t=",
        "\r=",
        "\n=",
        "＝",
        "＋",
        "－",
        "＠",
        " =",
        "  \t@",
        "\u00a0+",
        "\u3000－",
        "\ufeff=",
        "\x00=",
    ],
)
def test_no_text_of_the_csv_is_a_formula(start: str) -> None:
    evil = f'{start}HYPERLINK("http://x","y")'
    made = invoice(line(description=evil, resource=evil, price_book_version=evil, project_id=evil, model=evil))
    (row, total) = table(to_csv(made))
    for column in ("description", "resource", "price_book_version", "project", "model"):
        assert row[column] == "'" + evil
    assert total["amount"] == "366.00"
    # A figure below zero is a figure.
    assert dollars(-5_005_000_000) == "-5.005"


@given(st.integers(-(10**18), 10**18))
def test_amounts_have_every_digit_that_counts_and_their_sign(nanos_usd: int) -> None:
    assert Decimal(amount(nanos_usd).replace(",", "")) == Decimal(nanos_usd) / USD
    assert amount(1_234_500_000_000) == "1,234.50"
    assert amount(-4_900_000) == "-0.0049"


def test_fractions_of_a_cent_are_printed_and_the_rounding_is_a_row() -> None:
    lines = [line(number, amount_nanos_usd=4_900_000, exact_nanos_usd=4_900_000) for number in range(1, 4)]
    made = invoice(*lines, note="we were slow")
    made.rounding = invoice_pb2.INVOICE_ROUNDING_TOTAL
    made.total_nanos_usd, made.rounding_nanos_usd = -4_990_000_000, 300_000
    sheet = sheet_of(made)
    assert sheet.sums == (
        ("Subtotal", "0.0147"),
        ("Credit notes", "-5.005"),
        ("Rounding to the cent", "0.0003"),
        ("Total", "-4.99"),
    )
    html, pdf = to_html(sheet).decode(), " ".join("\n".join(pages(to_pdf(sheet))).split())
    for wanted in ("0.0049", "-5.005", "Rounding to the cent", "0.0003", "-4.99", "Only the total is rounded"):
        assert wanted in html, wanted
        assert wanted in pdf, wanted
    rows = table(to_csv(made))
    assert [(row["row"], row["amount"]) for row in rows] == [
        *[("line", "0.0049")] * 3,
        ("credit_note", "-5.005"),
        ("rounding", "0.0003"),
        ("total", "-4.99"),
    ]


def test_a_minimum_has_neither_quantity_nor_records() -> None:
    minimum = line(2, kind="minimum", description="Up to the minimum", quantity=0, unit="", usage_record_count=0)
    minimum.unit_price_nanos_usd = 0
    made = invoice(line(), minimum)
    drawn = sheet_of(made).lines[1]
    assert (drawn.quantity, drawn.unit_price, drawn.detail) == ("", "", "projects/p/tuningJobs/ft-2 · default-2026-1")
    row = table(to_csv(made))[1]
    assert (row["kind"], row["quantity"], row["unit"]) == ("minimum", "", "")


# As the version before wrote it; the message has none of the fields that came later.
ROUNDED_BY_LINE = """\
row,invoice,month,description,project,resource,kind,usage_kind,model,quantity,unit,unit_price,unit_priced,exact_amount,amount,currency,price_book_version,usage_records,minimum_applied
line,FM-000042,2026-10,"Tuning of meta-llama/Llama-3.1-8B, job ft-1",p,projects/p/tuningJobs/ft-1,tuning,,,60000000,tokens,6.10,1M tokens,366.00,366.00,USD,default-2026-1,120,false
line,FM-000042,2026-10,"Tuning of m, job ft-2, minimum per completed job",p,projects/p/tuningJobs/ft-2,tuning,,,60000000,tokens,6.10,1M tokens,5.00,5.00,USD,default-2026-1,120,true
line,FM-000042,2026-10,"Tuning of meta-llama/Llama-3.1-8B, job ft-3",p,projects/p/tuningJobs/ft-3,tuning,,,60000000,tokens,6.10,1M tokens,0.0049,0.00,USD,default-2026-1,120,false
credit_note,FM-000042,2026-10,CN-000007: we were slow,,,,,,,,,,-5.005,-5.00,USD,,,
total,FM-000042,2026-10,Total,,,,,,,,,,,366.00,USD,,,
"""  # noqa: E501


def test_an_invoice_that_was_closed_with_rounded_lines_keeps_its_documents() -> None:
    least = line(
        2,
        description="Tuning of m, job ft-2, minimum per completed job",
        amount_nanos_usd=5 * USD,
        exact_nanos_usd=5 * USD,
        minimum_applied=True,
    )
    made = invoice(line(), least, line(3, exact_nanos_usd=4_900_000, amount_nanos_usd=0), note="we were slow")
    assert to_csv(made).decode() == ROUNDED_BY_LINE.replace("\n", "\r\n")
    sheet = sheet_of(made)
    assert [each.amount for each in (*sheet.lines, *sheet.credit_notes)] == ["366.00", "5.00", "0.00", "-5.00"]
    assert sheet.sums == (("Subtotal", "371.00"), ("Credit notes", "-5.00"), ("Total", "366.00"))
    assert "rounded once, half to even, to the cent; a job's line is its settled charge." in sheet.recompute

"""`finemesh billing costs` and `export-usage`: what things cost, in sums and in single records."""

from __future__ import annotations

import csv
import enum
import json
import sys
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.text import Text

from finemesh.billing.v1 import invoice_service_pb2 as pb
from finemesh.billing.v1 import usage_record_pb2
from finemesh_client.billing import dollars
from finemesh_client.cli.billing.billing_commands import Kind
from finemesh_client.cli.output import as_dict, console, print_json, table
from finemesh_client.cli.runtime import AsJson, with_client
from finemesh_client.client import Client

_DAY = ["%Y-%m-%d"]
# What spreadsheets take for the beginning of a formula; what they cannot show before it, they strip or skip.
_FORMULA = frozenset("=+-@＝＋－＠")
_BREAKS = ("\t", "\r", "\n")
COLUMNS = (
    "usage_time",
    "billing_month",
    "kind",
    "resource",
    "model",
    "api_key_id",
    "quantity",
    "unit_price_nanos_usd",
    "amount_nanos_usd",
    "price_book_version",
    "work_key",
    "name",
)


class Dimension(enum.StrEnum):
    PROJECT = "project"
    MODEL = "model"
    DAY = "day"
    RESOURCE = "resource"
    API_KEY = "api-key"
    KIND = "kind"


class Format(enum.StrEnum):
    CSV = "csv"
    JSONL = "jsonl"


Start = Annotated[datetime | None, typer.Option("--from", formats=_DAY, help="First day, UTC.")]
End = Annotated[datetime | None, typer.Option("--to", formats=_DAY, help="Last day, UTC, included.")]


def costs(
    by: Annotated[
        list[Dimension] | None, typer.Option("--by", help="Sum by this; repeatable, in this order. By model.")
    ] = None,
    start: Start = None,
    end: End = None,
    project: Annotated[str, typer.Option("--project", help="Only this project, its id; all by default.")] = "",
    as_json: AsJson = False,
) -> None:
    """Sum what things cost; the running month by default, jobs while they run included.

    Try: finemesh billing costs --by day --by project
    """
    wanted = list(dict.fromkeys(by or [Dimension.MODEL]))

    async def work(mesh: Client) -> None:
        answer = await mesh.invoices.costs(
            f"{start:%Y-%m-%d}" if start else "",
            f"{end:%Y-%m-%d}" if end else "",
            group_by=[pb.CostDimension.Value(f"COST_DIMENSION_{dimension.name}") for dimension in wanted],
            project_id=project.rpartition("/")[2],
        )
        if as_json:
            return print_json(answer)
        rows = [
            (*row.keys, f"{row.quantity:,}" if row.quantity else "", dollars(row.amount_nanos_usd))
            for row in answer.rows
        ]
        table("costs", (*(dimension.value for dimension in wanted), "quantity", "cost"), rows)
        return console.print(Text.assemble("total ", (dollars(answer.total_nanos_usd), "bold")))

    with_client(work, as_json)


def export_usage(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; - for standard output.")],
    month: Annotated[str, typer.Option("--month", help="2026-11: the records of this month's invoice.")] = "",
    start: Start = None,
    end: End = None,
    resource: Annotated[str, typer.Option("--resource", help="Only this job, endpoint or model.")] = "",
    kind: Annotated[list[Kind] | None, typer.Option("--kind", help="Only these kinds; repeatable.")] = None,
    format: Annotated[Format, typer.Option("--format", help="CSV, or JSON lines.")] = Format.CSV,
    as_json: AsJson = False,
) -> None:
    """Write the project's usage records, oldest first: of a month's invoice, or of the days of use.

    Try: finemesh billing export-usage --month 2026-10 -o usage.csv
    """
    if not month and (start is None or end is None):
        raise typer.BadParameter("give --month, or --from and --to")

    async def work(mesh: Client) -> None:
        records = mesh.invoices.export_usage(
            month=month,
            start=start.replace(tzinfo=UTC) if start else None,
            end=_after(end.date()) if end else None,
            resource=resource,
            kinds=[usage_record_pb2.UsageKind.Value(f"USAGE_KIND_{each.name}") for each in kind or ()],
        )
        if str(output) == "-":
            await _write(records, format, sys.stdout)
            return None
        # Under another name until it is whole: half an export must not look like one.
        partial = output.with_name(output.name + ".part")
        with partial.open("w", encoding="utf-8", newline="") as file:
            count = await _write(records, format, file)
        partial.replace(output)
        if as_json:
            return print_json({"file": str(output), "format": format.value, "usage_record_count": count})
        return console.print(f"{count:,} usage records written to {output}", soft_wrap=True)

    with_client(work, as_json)


def _after(day: date) -> datetime:
    return datetime.combine(day + timedelta(days=1), time(), UTC)


async def _write(records: AsyncIterator[usage_record_pb2.UsageRecord], format: Format, file: TextIO) -> int:
    count = 0
    writer = csv.writer(file, lineterminator="\r\n")
    if format is Format.CSV:
        writer.writerow(COLUMNS)
    async for record in records:
        if format is Format.CSV:
            writer.writerow(row_of(record))
        else:
            file.write(json.dumps(as_dict(record), ensure_ascii=False) + "\n")
        count += 1
    return count


def row_of(record: usage_record_pb2.UsageRecord) -> list[str | int]:
    """The record in the order of COLUMNS; no text of it is run by a spreadsheet."""
    values: dict[str, str | int] = {
        **{column: getattr(record, column) for column in COLUMNS if column not in ("usage_time", "kind")},
        "usage_time": record.usage_time.ToJsonString(),
        "kind": usage_record_pb2.UsageKind.Name(record.kind).removeprefix("USAGE_KIND_").lower(),
    }
    row = [values[column] for column in COLUMNS]
    return [_text(value) if isinstance(value, str) else value for value in row]


def _text(value: str) -> str:
    seen = next((letter for letter in value if letter != " " and letter.isprintable()), "")
    return f"'{value}" if seen in _FORMULA or value.startswith(_BREAKS) else value

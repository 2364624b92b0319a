"""Checks what requests say and turns it into values. Not pure: protobuf.

It knows whose a request is, and which months, days and texts it may name. It reads no table.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from chassis import paging
from chassis.errors import NotFound, PermissionDenied, ResourceExhausted, invalid
from chassis.identity import Caller
from chassis.names import NAME_CHARS_MAX, parse_name
from chassis.timestamps import time_from_proto
from finemesh.billing.v1 import billing_service_pb2, invoice_pb2, invoice_service_pb2, usage_record_pb2
from finemesh.identity.v1 import identity_pb2
from services.billing.api.convert import USAGE_KIND_OF
from services.billing.calendar import Month
from services.billing.config import BillingSettings
from services.billing.invoices.convert import invoice_name, party_from_proto
from services.billing.invoices.crediting import Correction
from services.billing.terms import Party
from services.billing.usage.records import UsageKind
from services.billing.usage.usage_pages import EARLIEST, LATEST, UsageFilter

ADMIN = "admin"
_FRAME_BYTES = 512
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def own_account(caller: Caller) -> str:
    """The caller's organization."""
    if not caller.account:
        raise PermissionDenied("CALLER_NOT_ALLOWED", "this call must be made for an organization")
    return caller.account


def whole_account(caller: Caller) -> str:
    """The caller's organization, for what shows all of its projects: for admins."""
    account = own_account(caller)
    caller.require_role(ADMIN)
    return account


def costs_project(project_id: str, caller: Caller) -> str:
    """The project whose costs are summed: for an admin the named one or, if empty, all; for a member its own."""
    if ADMIN in caller.roles:
        return project_id
    if not caller.tenant or project_id not in ("", caller.tenant):
        # Alike whether the other project exists or not.
        caller.require_role(ADMIN)
    return caller.tenant


def month_of(name: str, account: str, now: datetime) -> Month:
    """The month of one of the caller's own invoices that can exist by now; the running one without a name."""
    running = Month.of(now)
    if not name:
        return running
    organization_id, month = invoice_of(name)
    if organization_id != account or month.start > running.start:
        raise NotFound("NOT_FOUND", f"name names nothing that exists: {name}", metadata={"name": name})
    return month


def invoice_of(name: str, field: str = "name") -> tuple[str, Month]:
    """Organization and month of anybody's invoice."""
    parts = parse_name(invoice_pb2.Invoice, name, field)
    month = Month.parse(parts["invoice"])
    if month is None:
        raise invalid(field, "must end in a month such as 2026-11")
    return parts["organization"], month


def correction_from_proto(
    request: invoice_service_pb2.CreateCreditNoteRequest, settings: BillingSettings
) -> Correction:
    organization_id = parse_name(identity_pb2.Organization, request.organization, "organization")["organization"]
    if not 1 <= request.amount_nanos_usd <= settings.amount_nanos_usd_max:
        raise invalid("amount_nanos_usd", f"must be from 1 to {settings.amount_nanos_usd_max}")
    check_text("reason", request.reason, settings.credit_reason_chars_max, needed=True)
    check_text("request_id", request.request_id, settings.request_id_chars_max, needed=True)
    check_text("resource", request.resource, NAME_CHARS_MAX)
    month = None
    if request.invoice:
        owner, month = invoice_of(request.invoice, "invoice")
        if owner != organization_id:
            raise invalid("invoice", "must be one of the organization that gets the credit note")
    return Correction(
        organization_id=organization_id,
        request_id=request.request_id,
        amount_nanos_usd=request.amount_nanos_usd,
        reason=request.reason,
        resource=request.resource,
        invoice=invoice_name(organization_id, month) if month else "",
        month=month,
    )


def profile_from_proto(message: invoice_pb2.BillingParty, settings: BillingSettings) -> Party:
    chars_max, lines_max = settings.party_text_chars_max, settings.party_lines_max
    check_text("profile.legal_name", message.legal_name, chars_max, needed=True)
    check_text("profile.tax_id", message.tax_id, chars_max)
    check_text("profile.email", message.email, chars_max)
    if len(message.address_lines) > lines_max:
        raise invalid("profile.address_lines", f"must be at most {lines_max}")
    for index, text in enumerate(message.address_lines):
        check_text(f"profile.address_lines[{index}]", text, chars_max, needed=True)
    return party_from_proto(message)


def usage_kinds_from_proto(values: Iterable[usage_record_pb2.UsageKind.ValueType]) -> tuple[UsageKind, ...]:
    found = []
    for index, value in enumerate(values):
        check_choice(f"kinds[{index}]", value, USAGE_KIND_OF)
        found.append(USAGE_KIND_OF[value])
    return tuple(found)


def export_filter_from_proto(request: invoice_service_pb2.ExportUsageRequest, project_id: str) -> UsageFilter:
    month = Month.parse(request.billing_month)
    if request.billing_month and month is None:
        raise invalid("billing_month", "must be a month such as 2026-11")
    for field in ("start_time", "end_time"):
        if month is None and not request.HasField(field):
            raise invalid(field, "must be given, or billing_month")
    check_text("resource", request.resource, NAME_CHARS_MAX)
    return replace(_usage_filter(request, project_id), billing_month=month.first_day if month else None)


def list_filter_from_proto(request: billing_service_pb2.ListUsageRecordsRequest, project_id: str) -> UsageFilter:
    for field in ("resource", "model", "api_key_id"):
        check_text(field, getattr(request, field), NAME_CHARS_MAX)
    return replace(_usage_filter(request, project_id), model=request.model, api_key_id=request.api_key_id)


def _usage_filter(
    request: invoice_service_pb2.ExportUsageRequest | billing_service_pb2.ListUsageRecordsRequest, project_id: str
) -> UsageFilter:
    start, end = _span(request)
    return UsageFilter(
        project_id=project_id,
        start=start,
        end=end,
        resource=request.resource,
        kinds=usage_kinds_from_proto(request.kinds),
    )


def month_before(cursor: paging.Cursor | None) -> date | None:
    if cursor is None:
        return None
    month = Month.parse(str(cursor[0]))
    if month is None:
        raise paging.invalid_token()
    return month.first_day


def days_of(start: str, end: str, now: datetime, days_max: int) -> tuple[date, date]:
    """First and last day of a report; the running month up to today where they are empty."""
    today = now.astimezone(UTC).date()
    first = _day("start_day", start) if start else today.replace(day=1)
    last = _day("end_day", end) if end else max(today, first)
    if last < first:
        raise invalid("end_day", f"must not be before {first}")
    if last - first > timedelta(days=days_max):
        raise invalid("end_day", f"must be at most {days_max} days after {first}")
    return first, last


def moment_of(field: str, message: Timestamp) -> datetime:
    try:
        return time_from_proto(message)
    except ValueError:
        raise invalid(field, "is no moment of this era") from None


def check_text(field: str, text: str, chars_max: int, *, needed: bool = False) -> None:
    lowest = 1 if needed else 0
    if not lowest <= len(text) <= chars_max or (text and not text.isprintable()) or (needed and not text.strip()):
        raise invalid(field, f"must be {lowest} to {chars_max} printable characters")


def check_choice(field: str, value: int, allowed: Collection[int]) -> None:
    if value not in allowed:
        raise invalid(field, f"{value} is not known")


def size_bytes_max(settings: BillingSettings) -> int:
    """What fits into one message, with some room for what stands around it."""
    return settings.message_size_bytes_max - _FRAME_BYTES


def check_size(size_bytes: int, settings: BillingSettings) -> None:
    """SIZE_LIMIT for what would not fit into one message."""
    limit_bytes = size_bytes_max(settings)
    if size_bytes > limit_bytes:
        raise ResourceExhausted(
            "SIZE_LIMIT",
            f"the document has {size_bytes} bytes and the limit is {limit_bytes}: take a shorter format such as CSV, or"
            " ask the operator to raise message_size_bytes_max",
            metadata={
                "limit": "message_size_bytes_max",
                "limit_bytes": str(limit_bytes),
                "size_bytes": str(size_bytes),
            },
        )


def _span(
    request: billing_service_pb2.ListUsageRecordsRequest | invoice_service_pb2.ExportUsageRequest,
) -> tuple[datetime, datetime]:
    first = moment_of("start_time", request.start_time) if request.HasField("start_time") else EARLIEST
    last = moment_of("end_time", request.end_time) if request.HasField("end_time") else LATEST
    if last < first:
        raise invalid("end_time", "must not be before start_time")
    return max(first, EARLIEST), min(max(last, EARLIEST), LATEST)


def _day(field: str, text: str) -> date:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        day = None
    if day is None or len(text) != len("2026-11-01") or not 2000 <= day.year <= 9000:
        raise invalid(field, "must be a day such as 2026-11-01")
    return day

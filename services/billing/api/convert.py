"""Between the messages of billing's services and the domain. It decides nothing."""

import json
from collections.abc import Iterable

from google.protobuf import text_format
from google.protobuf.json_format import MessageToJson, SerializeToJsonError
from google.protobuf.message import Message

from chassis.bus.dead_letters import DeadLetter
from chassis.errors import invalid
from chassis.names import format_name
from chassis.timestamps import time_to_proto
from finemesh.billing.v1 import (
    balance_pb2,
    billing_service_pb2,
    budget_service_pb2,
    invoice_service_pb2,
    ledger_service_pb2,
    usage_record_pb2,
)
from services.billing.audit.archive_audit import ArchiveProgress
from services.billing.audit.verification import Progress
from services.billing.budgets.caps import Budget
from services.billing.budgets.convert import budget_name
from services.billing.budgets.credit import CreditState, state_of
from services.billing.calendar import Month
from services.billing.convert import money_to_proto
from services.billing.ledger.chain import EntryRow
from services.billing.ledger.entries import Balances
from services.billing.prices.method_keys import METHOD_OF_KIND
from services.billing.prices.pricing import Price, QuantityInvalid, Work
from services.billing.usage.costs import CostRow, Dimension
from services.billing.usage.records import UsageKind, UsageRecord

_USAGE_KINDS = {
    UsageKind.TRAINING_TOKENS: usage_record_pb2.USAGE_KIND_TRAINING_TOKENS,
    UsageKind.EVALUATION_TOKENS: usage_record_pb2.USAGE_KIND_EVALUATION_TOKENS,
    UsageKind.INPUT_TOKENS: usage_record_pb2.USAGE_KIND_INPUT_TOKENS,
    UsageKind.OUTPUT_TOKENS: usage_record_pb2.USAGE_KIND_OUTPUT_TOKENS,
    UsageKind.ENDPOINT_MINUTES: usage_record_pb2.USAGE_KIND_ENDPOINT_MINUTES,
    UsageKind.CLUSTER_HOURS: usage_record_pb2.USAGE_KIND_CLUSTER_HOURS,
}
_CREDIT_STATES = {
    CreditState.SUFFICIENT: balance_pb2.CREDIT_STATE_SUFFICIENT,
    CreditState.LOW: balance_pb2.CREDIT_STATE_LOW,
    CreditState.EXHAUSTED: balance_pb2.CREDIT_STATE_EXHAUSTED,
}
USAGE_KIND_OF = {value: kind for kind, value in _USAGE_KINDS.items()}


def work_from_proto(request: billing_service_pb2.EstimatePriceRequest) -> Work:
    method = METHOD_OF_KIND.get(request.training_kind)
    if method is None:
        raise QuantityInvalid("training_kind", f"{request.training_kind} is not known")
    return Work(
        base_model=request.base_model,
        method=method,
        training_tokens=request.training_tokens,
        validation_tokens=request.validation_tokens,
        epochs=request.epochs,
        evaluations=request.evaluations,
        parameter_count=request.parameter_count,
    )


def price_to_proto(price: Price, version: str) -> billing_service_pb2.EstimatePriceResponse:
    return billing_service_pb2.EstimatePriceResponse(
        total_nanos_usd=price.total_nanos_usd,
        total=money_to_proto(price.total_nanos_usd),
        terms=[
            billing_service_pb2.PriceTerm(
                description=term.description,
                quantity=term.quantity,
                nanos_usd_per_million=term.nanos_usd_per_million,
                amount_nanos_usd=term.amount_nanos_usd,
            )
            for term in price.terms
        ],
        price_book_version=version,
        minimum_applied=price.minimum_applied,
    )


def balance_to_proto(organization_id: str, balances: Balances, low_balance_nanos_usd: int) -> balance_pb2.Balance:
    return balance_pb2.Balance(
        organization=f"organizations/{organization_id}",
        available_nanos_usd=balances.available_nanos_usd,
        held_nanos_usd=balances.held_nanos_usd,
        available=money_to_proto(balances.available_nanos_usd),
        owed_nanos_usd=balances.owed_nanos_usd,
        credit_state=_CREDIT_STATES[state_of(balances, low_balance_nanos_usd)],
        low_balance_nanos_usd=low_balance_nanos_usd,
    )


def usage_record_to_proto(record: UsageRecord) -> usage_record_pb2.UsageRecord:
    return usage_record_pb2.UsageRecord(
        name=format_name(usage_record_pb2.UsageRecord, project=record.project_id, usage_record=str(record.id)),
        work_key=record.work_key,
        kind=_USAGE_KINDS[record.kind],
        resource=record.resource,
        model=record.model,
        quantity=record.quantity,
        usage_time=time_to_proto(record.usage_time),
        amount_nanos_usd=record.amount_nanos_usd,
        price_book_version=record.price_book_version,
        start_step=record.start_step,
        end_step=record.end_step,
        unit_price_nanos_usd=record.unit_price_nanos_usd,
        api_key_id=record.api_key_id,
        billing_month=f"{record.billing_month:%Y-%m}",
    )


def budget_to_proto(budget: Budget, month: Month) -> budget_service_pb2.Budget:
    return budget_service_pb2.Budget(
        name=budget_name(budget),
        api_key_id=budget.api_key_id,
        monthly_cap_nanos_usd=budget.monthly_cap_nanos_usd,
        alert_percents=budget.alert_percents,
        spent_nanos_usd=budget.spent_nanos_usd,
        capped=budget.capped,
        month=str(month),
        update_time=time_to_proto(budget.update_time),
    )


def progress_to_proto(
    progress: Progress, archive: ArchiveProgress | None = None, *, done: bool = False
) -> ledger_service_pb2.VerifyLedgerResponse:
    """`archive` once its part has begun, which is the last."""
    found = archive.difference if archive is not None else progress.difference
    answer = ledger_service_pb2.VerifyLedgerResponse(
        check=archive.check if archive is not None else progress.check,
        transaction_count=progress.transactions,
        usage_record_count=progress.usage_records,
        hold_count=progress.holds,
        invoice_count=progress.invoices,
        done=done,
        difference=ledger_service_pb2.LedgerDifference(
            check=found.check, location=found.location, expected=found.expected, found=found.found
        )
        if found is not None
        else None,
    )
    if archive is not None:
        answer.archive_file_count = archive.files
        answer.archived_event_count = archive.events
        answer.older_record_count = archive.older_records
        if archive.begin_time is not None:
            answer.archive_begin_time.CopyFrom(time_to_proto(archive.begin_time))
    return answer


def journal_entry_to_proto(row: EntryRow) -> ledger_service_pb2.JournalEntry:
    assert row.id is not None and row.transaction_time is not None and row.hash is not None
    return ledger_service_pb2.JournalEntry(
        transaction_id=str(row.id),
        position=row.position,
        kind=row.kind or "",
        organization_id=row.organization_id,
        resource=row.resource or "",
        price_book_version=row.price_book_version or "",
        transaction_time=time_to_proto(row.transaction_time),
        postings=[
            ledger_service_pb2.JournalPosting(account=account, amount_nanos_usd=amount)
            for account, amount in zip(row.accounts or (), row.amounts or (), strict=True)
        ],
        hash=row.hash.hex(),
    )


def dead_letter_to_proto(
    letter: DeadLetter, event: Message | None, *, json_bytes_max: int
) -> ledger_service_pb2.DeadLetter:
    """`event` is None where its bytes cannot be read; one whose JSON is too long for an answer is left out as well."""
    shown = "" if event is None else _json_of(event)
    message = ledger_service_pb2.DeadLetter(
        event_id=str(letter.event_id),
        subject=letter.subject,
        reason=letter.reason,
        error=letter.error,
        failures=letter.failures,
        create_time=time_to_proto(letter.create_time),
        event_json=shown if len(shown.encode()) <= json_bytes_max else "",
        discarded_by=letter.discarded_by,
        discard_reason=letter.discard_reason,
    )
    if letter.discard_time is not None:
        message.discard_time.CopyFrom(time_to_proto(letter.discard_time))
    return message


def _json_of(event: Message) -> str:
    """A string in protobuf's text format where the event claims what JSON cannot hold, such as the year 300,000."""
    try:
        return MessageToJson(event, preserving_proto_field_name=True, indent=None)
    except (ValueError, SerializeToJsonError):
        return json.dumps(text_format.MessageToString(event, as_one_line=True))


_DIMENSIONS = {
    invoice_service_pb2.COST_DIMENSION_PROJECT: Dimension.PROJECT,
    invoice_service_pb2.COST_DIMENSION_MODEL: Dimension.MODEL,
    invoice_service_pb2.COST_DIMENSION_DAY: Dimension.DAY,
    invoice_service_pb2.COST_DIMENSION_RESOURCE: Dimension.RESOURCE,
    invoice_service_pb2.COST_DIMENSION_API_KEY: Dimension.API_KEY,
    invoice_service_pb2.COST_DIMENSION_KIND: Dimension.KIND,
}


def dimensions_from_proto(values: Iterable[invoice_service_pb2.CostDimension.ValueType]) -> list[Dimension]:
    """InvalidArgument for a dimension that is not known, and for one that comes twice."""
    found: list[Dimension] = []
    for index, value in enumerate(values):
        dimension = _DIMENSIONS.get(value)
        if dimension is None or dimension in found:
            problem = "is not known" if dimension is None else "comes twice"
            raise invalid(f"group_by[{index}]", problem)
        found.append(dimension)
    return found


def costs_to_proto(rows: Iterable[CostRow]) -> invoice_service_pb2.QueryCostsResponse:
    answer = invoice_service_pb2.QueryCostsResponse()
    for row in rows:
        answer.rows.add(
            keys=row.keys,
            quantity=row.quantity,
            amount_nanos_usd=row.amount_nanos_usd,
            usage_record_count=row.usage_record_count,
        )
        answer.total_nanos_usd += row.amount_nanos_usd
    return answer

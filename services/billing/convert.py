"""Between contracts and domain: the only place of billing that knows both. It decides nothing."""

from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp
from google.type import money_pb2

from chassis.names import format_name, parse_name
from finemesh.billing.v1 import balance_pb2, billing_service_pb2, usage_record_pb2
from finemesh.events.v1 import tuning_events_pb2, usage_events_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.billing.credit import CreditState, state_of
from services.billing.facts import ClusterFact, EndpointFact, FactInvalid, InferenceFact, TrainingFact
from services.billing.ledger import Balances
from services.billing.pricing import NANOS_USD_PER_USD, Price, QuantityInvalid, Work
from services.billing.records import JobEnding, UsageKind, UsageRecord
from services.billing.settlement import Ending

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_METHODS = {
    billing_service_pb2.TRAINING_KIND_UNSPECIFIED: "sft_lora",
    billing_service_pb2.TRAINING_KIND_SFT_LORA: "sft_lora",
    billing_service_pb2.TRAINING_KIND_SFT_FULL: "sft_full",
    billing_service_pb2.TRAINING_KIND_DPO_LORA: "dpo_lora",
    billing_service_pb2.TRAINING_KIND_DPO_FULL: "dpo_full",
}
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
_TRAINING_KINDS = {"train": UsageKind.TRAINING_TOKENS, "evaluate": UsageKind.EVALUATION_TOKENS}
_ENDINGS = {
    tuning_events_pb2.TUNING_JOB_ENDING_COMPLETED: Ending.COMPLETED,
    tuning_events_pb2.TUNING_JOB_ENDING_STOPPED_EARLY: Ending.STOPPED_EARLY,
    tuning_events_pb2.TUNING_JOB_ENDING_CANCELLED_RUNNING: Ending.CANCELLED_RUNNING,
    tuning_events_pb2.TUNING_JOB_ENDING_CANCELLED_BEFORE_RUN: Ending.CANCELLED_BEFORE_RUN,
    tuning_events_pb2.TUNING_JOB_ENDING_PLATFORM_FAILURE: Ending.PLATFORM_FAILURE,
    tuning_events_pb2.TUNING_JOB_ENDING_USER_FAILURE: Ending.USER_FAILURE,
    tuning_events_pb2.TUNING_JOB_ENDING_REFUSED: Ending.REFUSED,
}


def work_of(request: billing_service_pb2.EstimatePriceRequest) -> Work:
    method = _METHODS.get(request.training_kind)
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


def to_price(price: Price, version: str) -> billing_service_pb2.EstimatePriceResponse:
    return billing_service_pb2.EstimatePriceResponse(
        total_nanos_usd=price.total_nanos_usd,
        total=to_money(price.total_nanos_usd),
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


def to_balance(organization_id: str, balances: Balances, low_balance_nanos_usd: int) -> balance_pb2.Balance:
    return balance_pb2.Balance(
        organization=f"organizations/{organization_id}",
        available_nanos_usd=balances.available_nanos_usd,
        held_nanos_usd=balances.held_nanos_usd,
        available=to_money(balances.available_nanos_usd),
        owed_nanos_usd=balances.owed_nanos_usd,
        credit_state=_CREDIT_STATES[state_of(balances, low_balance_nanos_usd)],
        low_balance_nanos_usd=low_balance_nanos_usd,
    )


def to_usage_record(record: UsageRecord) -> usage_record_pb2.UsageRecord:
    return usage_record_pb2.UsageRecord(
        name=format_name(usage_record_pb2.UsageRecord, project=record.project_id, usage_record=str(record.id)),
        work_key=record.work_key,
        kind=_USAGE_KINDS[record.kind],
        resource=record.resource,
        model=record.model,
        quantity=record.quantity,
        usage_time=to_timestamp(record.usage_time),
        amount_nanos_usd=record.amount_nanos_usd,
        price_book_version=record.price_book_version,
        start_step=record.start_step,
        end_step=record.end_step,
        unit_price_nanos_usd=record.unit_price_nanos_usd,
        api_key_id=record.api_key_id,
        billing_month=f"{record.billing_month:%Y-%m}",
    )


def to_money(nanos_usd: int) -> money_pb2.Money:
    """For amounts that are not negative."""
    units, nanos = divmod(nanos_usd, NANOS_USD_PER_USD)
    return money_pb2.Money(currency_code="USD", units=units, nanos=nanos)


def training_fact(message: usage_events_pb2.TrainingUsageRecorded) -> tuple[TrainingFact, str]:
    """The fact, and the id of its job."""
    job_id = _job_id(message.tuning_job, message.project_id)
    kind = _TRAINING_KINDS.get(message.kind)
    if kind is None:
        raise FactInvalid(f"kind {message.kind!r} is neither train nor evaluate")
    fact = TrainingFact(
        work_key=message.work_key,
        organization_id=message.organization_id,
        project_id=message.project_id,
        resource=message.tuning_job,
        usage_time=_moment("usage_time", message.usage_time),
        kind=kind,
        start_step=message.start_step,
        end_step=message.end_step,
        tokens=message.tokens,
    )
    return fact, job_id


def inference_fact(record: usage_events_pb2.InferenceUsage) -> InferenceFact:
    return InferenceFact(
        work_key=record.work_key,
        organization_id=record.organization_id,
        project_id=record.project_id,
        resource=record.model_id,
        usage_time=_moment("usage_time", record.usage_time),
        base_model=record.base_model,
        input_tokens=record.input_tokens,
        output_tokens=record.output_tokens,
        api_key_id=record.api_key_id,
    )


def endpoint_fact(message: usage_events_pb2.EndpointMinuteRecorded) -> EndpointFact:
    return EndpointFact(
        work_key=message.work_key,
        organization_id=message.organization_id,
        project_id=message.project_id,
        resource=message.endpoint,
        usage_time=_moment("usage_time", message.usage_time),
        hardware_type=message.hardware_type,
        device_count=message.device_count,
        minute=message.minute,
    )


def cluster_fact(message: usage_events_pb2.ClusterHourRecorded) -> ClusterFact:
    return ClusterFact(
        work_key=message.work_key,
        organization_id=message.organization_id,
        project_id=message.project_id,
        resource=message.cluster,
        usage_time=_moment("usage_time", message.usage_time),
        hardware_type=message.hardware_type,
        node_count=message.node_count,
        hour=message.hour,
    )


def job_ending(message: tuning_events_pb2.TuningJobEnded) -> JobEnding:
    _job_id(message.tuning_job, message.project_id)
    ending = _ENDINGS.get(message.ending)
    if ending is None:
        raise FactInvalid(f"ending {message.ending} is not known")
    if message.usage_record_count < 0:
        raise FactInvalid("usage_record_count must not be negative")
    return JobEnding(
        resource=message.tuning_job,
        organization_id=message.organization_id,
        project_id=message.project_id,
        ending=ending,
        usage_record_count=message.usage_record_count,
        end_time=_moment("end_time", message.end_time),
    )


def _job_id(name: str, project_id: str) -> str:
    parts = parse_name(tuning_job_pb2.TuningJob, name, "tuning_job")
    if parts["project"] != project_id:
        raise FactInvalid(f"{name} is not a job of project {project_id!r}")
    return parts["tuning_job"]


def _moment(name: str, value: Timestamp) -> datetime:
    try:
        # Several times as fast as ToDatetime, which every served call would pay for.
        return _EPOCH + timedelta(0, value.seconds, value.nanos // 1000)
    except (ValueError, OverflowError):
        raise FactInvalid(f"{name} is no moment of this era") from None


def to_timestamp(moment: datetime) -> Timestamp:
    value = Timestamp()
    value.FromDatetime(moment)
    return value

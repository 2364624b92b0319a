"""Not pure: protobuf. What billing is asked about a job: the numbers of its price. It knows no price."""

from finemesh.billing.v1 import billing_service_pb2
from finemesh.common.v1 import training_options_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.spec.convert import spec_to_proto
from services.scheduler.spec.tuning_spec import TuningSpec


def price_request(
    spec: TuningSpec, counts: tuning_job_pb2.DatasetCounts, parameter_count: int
) -> billing_service_pb2.EstimatePriceRequest:
    """`spec` is complete; the same numbers make the quote and the hold."""
    return billing_service_pb2.EstimatePriceRequest(
        base_model=spec.base_model,
        training_kind=_training_kind(spec_to_proto(spec)),
        training_tokens=counts.training_tokens,
        validation_tokens=counts.validation_tokens,
        epochs=spec.hyperparameters.epochs,
        evaluations=spec.hyperparameters.evaluations or 0,
        parameter_count=parameter_count,
    )


def _training_kind(spec: tuning_job_pb2.TuningSpec) -> billing_service_pb2.TrainingKind.ValueType:
    fields = training_options_pb2.TrainingFields(
        method=spec.WhichOneof("method") or "", weights=spec.WhichOneof("weights") or ""
    )
    option = training_options_pb2.training
    kinds = billing_service_pb2.TrainingKind.DESCRIPTOR.values
    number = next(kind.number for kind in kinds if kind.GetOptions().Extensions[option] == fields)
    return billing_service_pb2.TrainingKind.ValueType(number)

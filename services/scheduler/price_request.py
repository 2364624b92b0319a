"""What billing is asked about a job: the numbers of its price. It knows no price."""

from finemesh.billing.v1 import billing_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.spec import TuningSpec


def price_request(
    spec: TuningSpec, counts: tuning_job_pb2.DatasetCounts, parameter_count: int
) -> billing_service_pb2.EstimatePriceRequest:
    """`spec` is complete; the same numbers make the quote and the hold."""
    kind = (
        billing_service_pb2.TRAINING_KIND_SFT_FULL if spec.lora is None else billing_service_pb2.TRAINING_KIND_SFT_LORA
    )
    return billing_service_pb2.EstimatePriceRequest(
        base_model=spec.base_model,
        training_kind=kind,
        training_tokens=counts.training_tokens,
        validation_tokens=counts.validation_tokens,
        epochs=spec.hyperparameters.epochs,
        evaluations=spec.hyperparameters.evaluations or 0,
        parameter_count=parameter_count,
    )

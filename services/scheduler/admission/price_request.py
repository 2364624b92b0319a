"""Not pure: protobuf. What billing is asked about a job: the numbers of its price. It knows no price."""

from finemesh.billing.v1 import billing_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.spec.tuning_spec import TuningSpec

# By whether it learns from preferences, and whether it trains an adapter.
_KINDS = {
    (False, True): billing_service_pb2.TRAINING_KIND_SFT_LORA,
    (False, False): billing_service_pb2.TRAINING_KIND_SFT_FULL,
    (True, True): billing_service_pb2.TRAINING_KIND_DPO_LORA,
    (True, False): billing_service_pb2.TRAINING_KIND_DPO_FULL,
}


def price_request(
    spec: TuningSpec, counts: tuning_job_pb2.DatasetCounts, parameter_count: int
) -> billing_service_pb2.EstimatePriceRequest:
    """`spec` is complete; the same numbers make the quote and the hold."""
    kind = _KINDS[spec.dpo is not None, spec.lora is not None]
    return billing_service_pb2.EstimatePriceRequest(
        base_model=spec.base_model,
        training_kind=kind,
        training_tokens=counts.training_tokens,
        validation_tokens=counts.validation_tokens,
        epochs=spec.hyperparameters.epochs,
        evaluations=spec.hyperparameters.evaluations or 0,
        parameter_count=parameter_count,
    )

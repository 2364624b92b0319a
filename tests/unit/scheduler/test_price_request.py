"""What billing is asked about a job names the kind of training that the contract lists for it."""

from __future__ import annotations

import pytest

from finemesh.billing.v1 import billing_service_pb2 as pb
from finemesh.tuning.v1.tuning_job_pb2 import DatasetCounts
from services.scheduler.admission.price_request import price_request
from services.scheduler.spec.tuning_methods import Dpo, Kto, Method
from services.scheduler.spec.tuning_spec import Lora, TuningSpec


@pytest.mark.parametrize(
    ("method", "lora", "kind"),
    [
        (None, Lora(), pb.TRAINING_KIND_SFT_LORA),
        (None, None, pb.TRAINING_KIND_SFT_FULL),
        (Dpo(), Lora(), pb.TRAINING_KIND_DPO_LORA),
        (Dpo(), None, pb.TRAINING_KIND_DPO_FULL),
        (Kto(), Lora(), pb.TRAINING_KIND_KTO_LORA),
        (Kto(), None, pb.TRAINING_KIND_KTO_FULL),
    ],
)
def test_a_job_is_priced_as_what_it_trains(
    method: Method | None, lora: Lora | None, kind: pb.TrainingKind.ValueType
) -> None:
    spec = TuningSpec(base_model="m", training_file="f", method=method, lora=lora)
    assert price_request(spec, DatasetCounts(training_tokens=7), 0).training_kind == kind

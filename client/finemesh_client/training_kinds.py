"""Which methods a job can have and which weights it can train, as the contract lists them.

It knows no setting of them.
"""

from __future__ import annotations

from types import MappingProxyType

from finemesh.billing.v1 import billing_service_pb2 as pb
from finemesh.common.v1 import training_options_pb2
from finemesh.tuning.v1 import tuning_job_pb2

_PREFIX = "TRAINING_KIND_"

# By the fields of a TuningSpec that are set, for example ("supervised", "lora").
TRAINING_KINDS = MappingProxyType(
    {
        (fields.method, fields.weights): pb.TrainingKind.ValueType(value.number)
        for value in pb.TrainingKind.DESCRIPTOR.values
        if (fields := value.GetOptions().Extensions[training_options_pb2.training]).method
    }
)
# The field of a TuningSpec by the method's word on the command line, for example `sft`.
METHOD_FIELDS = MappingProxyType(
    {
        pb.TrainingKind.Name(kind).removeprefix(_PREFIX).split("_")[0].lower(): method
        for (method, _), kind in TRAINING_KINDS.items()
    }
)


def training_kind(spec: tuning_job_pb2.TuningSpec) -> pb.TrainingKind.ValueType:
    """What is left out is what the server takes it as."""
    return TRAINING_KINDS[_method(spec), spec.WhichOneof("weights") or "lora"]


def method_word(spec: tuning_job_pb2.TuningSpec) -> str:
    """`sft`; also for a spec without a method."""
    return next(word for word, field in METHOD_FIELDS.items() if field == _method(spec))


def _method(spec: tuning_job_pb2.TuningSpec) -> str:
    return spec.WhichOneof("method") or "supervised"

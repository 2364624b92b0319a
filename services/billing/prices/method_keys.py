"""Not pure: protobuf. The methods that have a price: the contract's kinds of training, by their price books' keys."""

from types import MappingProxyType

from finemesh.billing.v1 import billing_service_pb2 as pb

_PREFIX = "TRAINING_KIND_"


def _key(kind: pb.TrainingKind.ValueType) -> str:
    """`sft_lora`."""
    return pb.TrainingKind.Name(kind).removeprefix(_PREFIX).lower()


METHODS = tuple(_key(kind) for kind in pb.TrainingKind.values() if kind)
METHOD_OF_KIND = MappingProxyType({kind: _key(kind or pb.TRAINING_KIND_SFT_LORA) for kind in pb.TrainingKind.values()})

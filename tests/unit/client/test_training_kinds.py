"""The contract's kinds of training: they name fields that exist, and all pairs of a method and weights."""

from __future__ import annotations

import itertools

from finemesh.billing.v1 import billing_service_pb2 as pb
from finemesh.tuning.v1 import tuning_job_pb2
from finemesh_client.training_kinds import METHOD_FIELDS, TRAINING_KINDS, method_word, training_kind

_ONEOFS = tuning_job_pb2.TuningSpec.DESCRIPTOR.oneofs_by_name


def test_every_method_has_a_kind_with_every_weights() -> None:
    methods, weights = ([field.name for field in _ONEOFS[name].fields] for name in ("method", "weights"))
    assert set(TRAINING_KINDS) == set(itertools.product(methods, weights))
    assert set(TRAINING_KINDS.values()) == set(pb.TrainingKind.values()) - {pb.TRAINING_KIND_UNSPECIFIED}


def test_the_name_of_a_kind_is_its_method_and_its_weights() -> None:
    for word, method in METHOD_FIELDS.items():
        for (field, weights), kind in TRAINING_KINDS.items():
            if field == method:
                assert pb.TrainingKind.Name(kind) == f"TRAINING_KIND_{word}_{weights}".upper()


def test_a_spec_tells_its_kind() -> None:
    for (method, weights), kind in TRAINING_KINDS.items():
        spec = tuning_job_pb2.TuningSpec()
        getattr(spec, method).SetInParent()
        getattr(spec, weights).SetInParent()
        assert training_kind(spec) == kind
        assert METHOD_FIELDS[method_word(spec)] == method
    assert method_word(tuning_job_pb2.TuningSpec()) == "sft"
    assert training_kind(tuning_job_pb2.TuningSpec()) == pb.TRAINING_KIND_SFT_LORA

"""Settings are bounded, and everything that is wrong is said at once, by field and range."""

from typing import Any

import pytest

from services.trainer.train.failures import Failure
from services.trainer.train.spec import LoraTraining, parse_spec

SMALLEST = {"job_id": "ft-1", "base_model": {"directory": "base"}, "train_file": "train.jsonl"}


def violations_of(document: Any) -> dict[str, str]:
    with pytest.raises(Failure) as caught:
        parse_spec(document)
    assert (caught.value.kind, caught.value.reason) == ("user", "INVALID_FIELD")
    return {violation.field: violation.description for violation in caught.value.violations}


def test_the_smallest_spec_gets_the_documented_defaults() -> None:
    spec = parse_spec(SMALLEST)
    assert spec.training == LoraTraining(r=16, alpha=32, dropout=0.0, target_modules="all-linear")
    assert (spec.epochs, spec.evaluations, spec.checkpoints, spec.batch_size) == (1, 0, 1, 8)
    assert (spec.learning_rate, spec.schedule.type, spec.schedule.num_cycles) == (1e-5, "cosine", 0.5)
    assert (spec.max_grad_norm, spec.weight_decay, spec.warmup_ratio) == (1.0, 0.0, 0.0)
    assert (spec.packing, spec.train_on_inputs, spec.max_seq_length) == (True, "auto", None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", True),
        ("epochs", 1.5),
        ("batch_size", -1),
        ("batch_size", "max"),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", 1e9),
        ("warmup_ratio", 1.1),
        ("weight_decay", -0.1),
        ("max_grad_norm", -1),
        ("seed", 2**32),
        ("max_seq_length", 8),
        ("packing", 1),
        ("train_on_inputs", "sometimes"),
        ("train_on_inputs", 1),
        ("device", "tpu"),
        ("threads", 0),
        ("template_date", "today"),
        ("job_id", ""),
        ("train_file", 7),
        ("method", "dpo"),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: Any) -> None:
    assert list(violations_of({**SMALLEST, field: value})) == [field]


@pytest.mark.parametrize(
    ("training", "field"),
    [
        ({"type": "lora", "r": 0}, "training.r"),
        ({"type": "lora", "r": 257}, "training.r"),
        ({"type": "lora", "alpha": 0}, "training.alpha"),
        ({"type": "lora", "dropout": 1.0}, "training.dropout"),
        ({"type": "lora", "target_modules": []}, "training.target_modules"),
        ({"type": "lora", "target_modules": ["../x"]}, "training.target_modules"),
        ({"type": "full", "r": 8}, "training.r"),
        ({"type": "qlora"}, "training.type"),
        ("lora", "training"),
    ],
)
def test_training_settings_are_bounded(training: Any, field: str) -> None:
    assert list(violations_of({**SMALLEST, "training": training})) == [field]


def test_all_violations_come_at_once_and_unknown_fields_are_among_them() -> None:
    document = {"epochs": 0, "learnig_rate": 1.0, "schedule": {"num_cycles": 0}, "evaluations": 2, "base_model": {}}
    found = violations_of(document)
    assert set(found) == {
        "job_id", "base_model.directory", "train_file", "epochs", "learnig_rate", "schedule.num_cycles", "evaluations",
    }  # fmt: skip
    assert found["epochs"] == "must be an integer from 1 to 100, not 0"
    assert found["schedule.num_cycles"] == "must be a number above 0 to 10, not 0"


@pytest.mark.parametrize("document", [None, [], "x", 3])
def test_a_spec_that_is_no_object_is_refused(document: Any) -> None:
    assert violations_of(document)["$"] == "must be a JSON object"


def test_the_digest_follows_what_is_learned_not_where() -> None:
    digest = parse_spec(SMALLEST).digest()
    moved = {**SMALLEST, "train_file": "elsewhere.jsonl", "resume_from": "x", "keep_last": 5, "job_id": "ft-2"}
    assert parse_spec(moved).digest() == digest
    for change in ({"seed": 1}, {"epochs": 2}, {"checkpoint_every_steps": 7}, {"training": {"type": "full"}}):
        assert parse_spec({**SMALLEST, **change}).digest() != digest

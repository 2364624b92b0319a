"""Settings are bounded, and everything that is wrong is said at once, by field and range."""

from typing import Any

import pytest

from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.limits import MICRO_BATCH_TOKENS
from services.trainer.train.settings.methods import Dpo, EarlyStopping, Kto
from services.trainer.train.settings.spec import LoraTraining
from services.trainer.train.settings.spec_json import parse_spec

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
    assert (spec.learning_rate, spec.schedule.type, spec.schedule.num_cycles) == (2e-4, "cosine", 0.5)
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
        ("parity_command", "python"),
        ("parity_command", ["python", ""]),
        ("method", "ppo"),
        ("dpo", {"beta": 0.1}),
        ("early_stopping", {}),
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


def test_the_size_of_micro_batches_is_the_devices_own_unless_it_is_set() -> None:
    on_a_gpu = {**SMALLEST, "device": "cuda:0"}
    assert parse_spec(SMALLEST).micro_batch_tokens == MICRO_BATCH_TOKENS["cpu"]
    assert parse_spec({**SMALLEST, "micro_batch_tokens": None}) == parse_spec(SMALLEST)
    assert parse_spec(on_a_gpu).micro_batch_tokens == MICRO_BATCH_TOKENS["cuda"]
    # A run may move to another kind of device; one whose sums were asked to be made another way is another run.
    assert parse_spec(on_a_gpu).digest() == parse_spec(SMALLEST).digest()
    assert parse_spec({**SMALLEST, "micro_batch_tokens": 64}).digest() != parse_spec(SMALLEST).digest()
    assert list(violations_of({**SMALLEST, "micro_batch_tokens": 63})) == ["micro_batch_tokens"]


@pytest.mark.parametrize(
    ("dpo", "field"),
    [
        ({"beta": 0}, "dpo.beta"),
        ({"beta": 10.1}, "dpo.beta"),
        ({"beta": float("nan")}, "dpo.beta"),
        ({"rpo_alpha": -1}, "dpo.rpo_alpha"),
        ({"simpo_gamma": 11}, "dpo.simpo_gamma"),
        ({"reference_free": 1}, "dpo.reference_free"),
        ({"normalize_logratios_by_length": "yes"}, "dpo.normalize_logratios_by_length"),
        ({"gamma": 1}, "dpo.gamma"),
    ],
)
def test_settings_of_preferences_are_bounded(dpo: Any, field: str) -> None:
    assert list(violations_of({**SMALLEST, "method": "dpo", "dpo": dpo})) == [field]


def test_preferences_have_defaults_and_belong_to_their_method() -> None:
    assert parse_spec(SMALLEST).method_settings is None
    assert parse_spec({**SMALLEST, "method": "dpo"}).method_settings == Dpo(beta=0.1)
    assert parse_spec({**SMALLEST, "method": "dpo", "dpo": {"beta": 10}}).method_settings == Dpo(beta=10.0)


def test_early_stopping_needs_as_many_evaluations_as_could_end_a_run() -> None:
    evaluated = {**SMALLEST, "validation_file": "held.jsonl", "evaluations": 1}
    assert parse_spec({**evaluated, "epochs": 4, "early_stopping": {}}).early_stopping == EarlyStopping(
        patience=2, min_delta=0.0, warmup_evaluations=1
    )
    refused = violations_of({**evaluated, "epochs": 3, "early_stopping": {}})
    assert "patience + warmup_evaluations + 1 = 4 evaluations" in refused["early_stopping"]
    assert "there are 3" in refused["early_stopping"]
    assert list(violations_of({**evaluated, "epochs": 4, "early_stopping": {"patience": 0}})) == [
        "early_stopping.patience"
    ]


def test_layers_are_compiled_on_cuda_only_and_that_is_no_other_run() -> None:
    assert violations_of({**SMALLEST, "compile": True}) == {
        "compile": 'must be false on device "cpu": it pays on CUDA only'
    }
    assert violations_of({**SMALLEST, "device": "cuda:0", "compile": 1}) == {"compile": "must be true or false, not 1"}
    compiled = parse_spec({**SMALLEST, "device": "cuda:0", "compile": True})
    assert compiled.compile
    assert compiled.digest() == parse_spec(SMALLEST).digest()


def test_runs_from_before_these_settings_keep_their_digest() -> None:
    """A checkpoint of a run that never heard of them is continued; the agent always names the learning rate."""
    spec = parse_spec({**SMALLEST, "learning_rate": 1e-5})
    assert spec.digest() == "09302beb7d4c8c32d1aa6cc519f9702aaf470d125dc69762f53f183c64ff2c17"


def test_what_is_learned_from_and_started_from_is_part_of_the_digest_and_where_it_lies_is_not() -> None:
    start = {"directory": "inputs/start", "tuning_job": "projects/p/tuningJobs/ft-0", "sha256": "a" * 64}
    begun = parse_spec({**SMALLEST, "start_from": start})
    elsewhere = parse_spec({**SMALLEST, "start_from": {**start, "directory": "/other"}})
    other = parse_spec({**SMALLEST, "start_from": {**start, "sha256": "b" * 64}})
    digests = [parse_spec(SMALLEST).digest(), begun.digest(), other.digest()]
    digests += [parse_spec({**SMALLEST, "method": "dpo", "dpo": {"beta": beta}}).digest() for beta in (0.1, 0.2)]
    assert len(set(digests)) == 5
    assert elsewhere.digest() == begun.digest()


def test_the_settings_of_feedback() -> None:
    assert parse_spec({**SMALLEST, "method": "kto"}).method_settings == Kto(beta=0.1)
    asked = {"beta": 0.3, "desirable_weight": 2, "undesirable_weight": 0.5}
    spec = parse_spec({**SMALLEST, "method": "kto", "kto": asked})
    assert spec.method_settings == Kto(beta=0.3, desirable_weight=2.0, undesirable_weight=0.5)
    assert spec.decisive()["kto"] == asked


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"method": "kto", "kto": {"beta": 0}}, "kto.beta"),
        ({"method": "kto", "kto": {"desirable_weight": 0}}, "kto.desirable_weight"),
        ({"method": "kto", "kto": {"undesirable_weight": 101}}, "kto.undesirable_weight"),
        ({"method": "kto", "kto": {"rpo_alpha": 1}}, "kto.rpo_alpha"),
        ({"method": "kto", "dpo": {}}, "dpo"),
        ({"kto": {}}, "kto"),
    ],
)
def test_wrong_settings_of_feedback_are_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(Failure) as refused:
        parse_spec({**SMALLEST, **changes})
    assert [violation.field for violation in refused.value.violations] == [field]

"""Defaults and bounds of a spec: every violation at once, with the field, the range and what was given."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.spec import (
    BaseLimits,
    Hyperparameters,
    Lora,
    Schedule,
    TuningSpec,
    complete,
    default_output_name,
    violations_of,
)

BASE = BaseLimits(context_tokens_max=2048, adapter_rank_max=64)
SPEC = TuningSpec(base_model="finemesh/demo-llama", training_file="projects/p/files/f")
JOB_ID = "ft-01jd0000000000000000000000"


def fields(spec: TuningSpec) -> list[str]:
    return [violation.field for violation in violations_of(spec)]


def test_the_least_request_gets_every_default() -> None:
    spec, violations = complete(SPEC, BASE, JOB_ID)
    assert violations == [] == violations_of(SPEC)
    assert spec.lora == Lora(rank=16, alpha=32)
    assert spec.gpu_count == 1
    assert spec.output_name == f"demo-llama-{JOB_ID}"
    assert spec.hyperparameters == Hyperparameters(
        epochs=1,
        evaluations=0,
        batch_size=8,
        learning_rate=1e-4,
        schedule=Schedule.COSINE,
        gradient_norm_max=1.0,
        sequence_tokens_max=2048,
        seed=42,
    )


def test_a_complete_spec_is_valid_and_stays_as_it_is() -> None:
    spec, _ = complete(replace(SPEC, validation_file="projects/p/files/v"), BASE, JOB_ID)
    assert violations_of(spec) == []
    assert complete(spec, BASE, "ft-other") == (spec, [])


def test_a_validation_file_brings_one_evaluation_per_epoch() -> None:
    spec, _ = complete(replace(SPEC, validation_file="projects/p/files/v"), BASE, JOB_ID)
    assert spec.hyperparameters.evaluations == 1
    none = replace(SPEC, validation_file="projects/p/files/v", hyperparameters=Hyperparameters(evaluations=0))
    assert complete(none, BASE, JOB_ID)[0].hyperparameters.evaluations == 0


def test_zero_where_zero_means_something_is_kept() -> None:
    given_zero = Hyperparameters(seed=0, gradient_norm_max=0.0, evaluations=0)
    kept = complete(replace(SPEC, hyperparameters=given_zero), BASE, JOB_ID)[0].hyperparameters
    assert (kept.seed, kept.gradient_norm_max, kept.evaluations) == (0, 0.0, 0)


def test_all_violations_come_at_once() -> None:
    spec = TuningSpec(
        base_model="",
        training_file="",
        output_name="Not Good",
        train_on_inputs=None,
        lora=Lora(rank=257, alpha=-1, dropout=1.0, target_modules=("ok", "not ok")),
        hyperparameters=Hyperparameters(
            epochs=101,
            evaluations=3,
            batch_size=-8,
            learning_rate=-1e-4,
            warmup_ratio=1.5,
            schedule=None,
            min_learning_rate_ratio=-0.1,
            weight_decay=2,
            gradient_norm_max=1001,
            sequence_tokens_max=15,
            seed=-1,
            checkpoint_interval_steps=1_000_001,
        ),
        gpu_count=-1,
    )
    at = "spec.hyperparameters"
    assert sorted(fields(spec)) == sorted(
        [
            "spec.base_model",
            "spec.training_file",
            "spec.output_name",
            "spec.supervised.train_on_inputs",
            "spec.gpu_count",
            "spec.lora.rank",
            "spec.lora.alpha",
            "spec.lora.dropout",
            "spec.lora.target_modules[1]",
            f"{at}.epochs",
            f"{at}.evaluations",
            f"{at}.batch_size",
            f"{at}.learning_rate",
            f"{at}.warmup_ratio",
            f"{at}.learning_rate_schedule",
            f"{at}.min_learning_rate_ratio",
            f"{at}.weight_decay",
            f"{at}.gradient_norm_max",
            f"{at}.sequence_tokens_max",
            f"{at}.seed",
            f"{at}.checkpoint_interval_steps",
        ]
    )


def test_a_violation_names_the_range_and_what_was_given() -> None:
    (violation,) = violations_of(replace(SPEC, hyperparameters=Hyperparameters(epochs=500)))
    assert violation.description == "must be 1 to 100, or 0 for 1; got 500"


@pytest.mark.parametrize("name", ["learning_rate", "warmup_ratio", "weight_decay", "gradient_norm_max"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    spec = replace(SPEC, hyperparameters=replace(Hyperparameters(), **{name: value}))
    assert fields(spec) == [f"spec.hyperparameters.{name}"]


def test_what_the_base_does_not_allow() -> None:
    asked = replace(SPEC, lora=Lora(rank=65), hyperparameters=Hyperparameters(sequence_tokens_max=2049))
    assert violations_of(asked) == []
    _, violations = complete(asked, BASE, JOB_ID)
    assert [violation.field for violation in violations] == [
        "spec.hyperparameters.sequence_tokens_max",
        "spec.lora.rank",
    ]
    assert "2048" in violations[0].description


def test_full_weights_have_no_rank() -> None:
    spec, violations = complete(replace(SPEC, lora=None), BASE, JOB_ID)
    assert spec.lora is None
    assert violations == []


@given(st.text(max_size=300))
def test_a_default_name_is_always_a_name(base_model: str) -> None:
    spec = replace(SPEC, output_name=default_output_name(base_model, JOB_ID))
    assert violations_of(spec) == []


@given(st.integers(), st.integers(), st.floats(), st.integers())
def test_whatever_passes_is_bounded(epochs: int, batch_size: int, learning_rate: float, tokens: int) -> None:
    asked = replace(
        SPEC,
        hyperparameters=Hyperparameters(
            epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, sequence_tokens_max=tokens
        ),
    )
    if violations_of(asked):
        return
    spec, violations = complete(asked, BASE, JOB_ID)
    if not violations:
        got = spec.hyperparameters
        assert 1 <= got.epochs <= 100
        assert 1 <= got.batch_size <= 4096
        assert 0 < got.learning_rate <= 1
        assert 16 <= got.sequence_tokens_max <= 2048

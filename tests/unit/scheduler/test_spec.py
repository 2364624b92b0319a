"""Defaults and bounds of a spec: every violation at once, with the field, the range and what was given."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.spec.convert import spec_from_proto, spec_to_proto
from services.scheduler.spec.defaults import complete, default_output_name
from services.scheduler.spec.origin import Origin, OriginName, parse_origin
from services.scheduler.spec.tuning_limits import BaseFacts, Limits, LimitsTable, load_limits
from services.scheduler.spec.tuning_methods import Dpo, Kto
from services.scheduler.spec.tuning_spec import (
    EarlyStopping,
    HubStart,
    Hyperparameters,
    Lora,
    Schedule,
    TuningSpec,
)
from services.scheduler.spec.violations import violations_of

BASE = load_limits().of("finemesh/demo-llama", BaseFacts(context_tokens_max=2048, adapter_rank_max=64))
SPEC = TuningSpec(base_model="finemesh/demo-llama", training_file="projects/p/files/f")
JOB_ID = "ft-01jd0000000000000000000000"
VALIDATED = replace(SPEC, validation_file="projects/p/files/v")


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
        learning_rate=2e-4,
        schedule=Schedule.COSINE,
        gradient_norm_max=1.0,
        sequence_tokens_max=2048,
        seed=42,
        cycle_count=0.5,
        gradient_accumulation_steps=1,
        packing=True,
        checkpoints=1,
    )


def test_a_complete_spec_is_valid_and_stays_as_it_is() -> None:
    spec, _ = complete(replace(SPEC, validation_file="projects/p/files/v"), BASE, JOB_ID)
    assert violations_of(spec) == []
    assert complete(spec, BASE, "ft-other") == (spec, [])


def test_evaluations_are_asked_for_because_each_is_billed() -> None:
    spec, _ = complete(VALIDATED, BASE, JOB_ID)
    assert spec.hyperparameters.evaluations == 0
    asked = replace(VALIDATED, hyperparameters=Hyperparameters(evaluations=3))
    assert complete(asked, BASE, JOB_ID)[0].hyperparameters.evaluations == 3


def test_zero_where_zero_means_something_is_kept() -> None:
    given_zero = Hyperparameters(seed=0, gradient_norm_max=0.0, evaluations=0)
    kept = complete(replace(SPEC, hyperparameters=given_zero), BASE, JOB_ID)[0].hyperparameters
    assert (kept.seed, kept.gradient_norm_max, kept.evaluations) == (0, 0.0, 0)


def test_all_violations_come_at_once() -> None:
    spec = TuningSpec(
        base_model="no model",
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
            cycle_count=11,
            gradient_accumulation_steps=257,
            checkpoints=101,
            early_stopping=EarlyStopping(patience=-1, min_delta=math.inf, warmup_evaluations=101),
        ),
        method=Dpo(beta=-0.1, rpo_alpha=math.nan, simpo_gamma=11),
        gpu_count=-1,
        from_checkpoint="Not:A:Name",
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
            f"{at}.cycle_count",
            f"{at}.gradient_accumulation_steps",
            f"{at}.checkpoints",
            f"{at}.early_stopping",
            f"{at}.early_stopping.patience",
            f"{at}.early_stopping.min_delta",
            f"{at}.early_stopping.warmup_evaluations",
            "spec.dpo.beta",
            "spec.dpo.rpo_alpha",
            "spec.dpo.simpo_gamma",
            "spec.from_checkpoint",
        ]
    )


def test_a_violation_names_the_range_and_what_was_given() -> None:
    (violation,) = violations_of(replace(SPEC, hyperparameters=Hyperparameters(epochs=500)))
    assert violation.description == "must be 1 to 100, or 0 for 1; got 500"


@pytest.mark.parametrize("name", ["learning_rate", "warmup_ratio", "weight_decay", "gradient_norm_max"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    change: dict[str, Any] = {name: value}
    spec = replace(SPEC, hyperparameters=replace(Hyperparameters(), **change))
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


def stopping(spec: TuningSpec, **hyperparameters: object) -> list[str]:
    given = Hyperparameters(early_stopping=EarlyStopping(), **hyperparameters)  # type: ignore[arg-type]
    return fields(replace(spec, hyperparameters=given))


def test_early_stopping_has_defaults_and_needs_enough_evaluations() -> None:
    at = "spec.hyperparameters.early_stopping"
    assert stopping(SPEC, epochs=10) == [at]
    assert stopping(VALIDATED, epochs=100) == [at]
    assert stopping(VALIDATED, epochs=3, evaluations=1) == [at]
    assert stopping(VALIDATED, epochs=4, evaluations=1) == []
    assert stopping(VALIDATED, epochs=1, evaluations=4) == []
    assert stopping(VALIDATED, epochs=100, evaluations=0) == [at]
    asked = Hyperparameters(epochs=4, evaluations=1, early_stopping=EarlyStopping())
    spec = replace(VALIDATED, hyperparameters=asked)
    completed, _ = complete(spec, BASE, JOB_ID)
    assert completed.hyperparameters.early_stopping == EarlyStopping(patience=2, min_delta=0.0, warmup_evaluations=1)
    assert complete(completed, BASE, JOB_ID) == (completed, [])


def test_preferences_get_their_defaults_and_are_not_packed() -> None:
    spec, violations = complete(replace(SPEC, method=Dpo()), BASE, JOB_ID)
    assert violations == []
    assert spec.method == Dpo(beta=0.1)
    assert spec.hyperparameters.packing is False
    assert complete(spec, BASE, JOB_ID) == (spec, [])


def test_judged_answers_get_their_defaults_and_are_not_packed() -> None:
    spec, violations = complete(replace(SPEC, method=Kto(undesirable_weight=0.5)), BASE, JOB_ID)
    assert violations == []
    assert spec.method == Kto(beta=0.1, desirable_weight=1.0, undesirable_weight=0.5)
    assert spec.hyperparameters.packing is False
    assert complete(spec, BASE, JOB_ID) == (spec, [])


def test_weights_of_thumbs_out_of_range_are_refused() -> None:
    found = violations_of(replace(SPEC, method=Kto(beta=-1, desirable_weight=101, undesirable_weight=math.nan)))
    assert [(violation.field, violation.description) for violation in found] == [
        ("spec.kto.beta", "must be above 0 to 10, or 0 for 0.1; got -1"),
        ("spec.kto.desirable_weight", "must be above 0 to 100, or 0 for 1; got 101"),
        ("spec.kto.undesirable_weight", "must be above 0 to 100, or 0 for 1; got nan"),
    ]


@pytest.mark.parametrize("beta", [10.0, 1e-6, 0.0])
def test_a_beta_in_range_passes(beta: float) -> None:
    assert fields(replace(SPEC, method=Dpo(beta=beta))) == []


@pytest.mark.parametrize(("beta"), [10.1, -1e-9, math.nan, math.inf])
def test_a_beta_out_of_range_is_refused(beta: float) -> None:
    assert fields(replace(SPEC, method=Dpo(beta=beta))) == ["spec.dpo.beta"]


def test_waves_belong_to_the_cosine() -> None:
    linear = replace(SPEC, hyperparameters=Hyperparameters(schedule=Schedule.LINEAR))
    assert complete(linear, BASE, JOB_ID)[0].hyperparameters.cycle_count == 0
    waves = replace(SPEC, hyperparameters=Hyperparameters(schedule=Schedule.LINEAR, cycle_count=2))
    assert fields(waves) == ["spec.hyperparameters.cycle_count"]


@pytest.mark.parametrize(
    ("spec", "largest"),
    [
        (SPEC, 1024),
        (replace(SPEC, lora=None), 1024),
        (replace(SPEC, method=Dpo()), 512),
    ],
)
def test_the_largest_batch_is_the_one_of_the_limits(spec: TuningSpec, largest: int) -> None:
    asked = replace(spec, hyperparameters=Hyperparameters(batch_size_max=True))
    completed, violations = complete(asked, BASE, JOB_ID)
    assert (completed.hyperparameters.batch_size, violations) == (largest, [])
    assert complete(completed, BASE, JOB_ID) == (completed, [])
    over = replace(spec, hyperparameters=Hyperparameters(batch_size=largest + 1))
    assert [violation.field for violation in complete(over, BASE, JOB_ID)[1]] == ["spec.hyperparameters.batch_size"]
    both = replace(spec, hyperparameters=Hyperparameters(batch_size=4, batch_size_max=True))
    assert [violation.field for violation in complete(both, BASE, JOB_ID)[1]] == ["spec.hyperparameters.batch_size"]


def limits_at(parameters: int, table: LimitsTable | None = None) -> Limits:
    facts = BaseFacts(context_tokens_max=0, adapter_rank_max=0, parameter_count=parameters)
    return (table or load_limits()).of("m", facts)


def test_larger_models_take_smaller_batches() -> None:
    batches = [limits_at(parameters).batch_lora for parameters in (1, 10**9, 10**9 + 1, 10**11)]
    assert batches == sorted(batches, reverse=True)
    assert batches[1] > batches[2] > batches[3]
    assert (limits_at(1).sequence_tokens_max, limits_at(1).lora_rank_max) == (131_072, 256)


def test_a_model_has_limits_of_its_own() -> None:
    tier = {"parameters_max": None, "batch_lora": 64, "batch_full": 32, "batch_dpo": 16}
    own = {"m": {"batch_dpo": 0, "batch_full": 0, "sequence_tokens_max": 100, "lora_rank_max": 8}}
    limits = limits_at(1, LimitsTable({"by_parameters": [tier], "models": own}))
    assert (limits.sequence_tokens_max, limits.lora_rank_max, limits.lora_rank_default) == (100, 8, 8)
    refused = complete(replace(SPEC, method=Dpo()), limits, JOB_ID)[1]
    assert [violation.field for violation in refused] == ["spec.dpo"]
    refused = complete(replace(SPEC, lora=None), limits, JOB_ID)[1]
    assert [violation.field for violation in refused] == ["spec.full"]
    with pytest.raises(ValueError, match="batch_loar"):
        LimitsTable({"by_parameters": [tier], "models": {"m": {"batch_loar": 1}}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ft-01jd", OriginName(job_id="ft-01jd")),
        ("ft-01jd:120", OriginName(job_id="ft-01jd", step=120)),
        ("projects/p1/tuningJobs/ft-01jd:0", OriginName(job_id="ft-01jd", project_id="p1", step=0)),
        ("acme/support-bot", OriginName(output_name="support-bot", namespace="acme")),
        ("support-bot:7", OriginName(output_name="support-bot", step=7)),
        ("", None),
        ("ft-01jd:", None),
        ("ft-01jd:-1", None),
        ("ft-01jd:1:2", None),
        ("projects/p1/files/f", None),
        ("../x", None),
        ("a" * 500, None),
    ],
)
def test_what_is_continued_is_a_job_or_a_model_and_at_most_a_step(text: str, expected: OriginName | None) -> None:
    assert parse_origin(text) == expected


ORIGIN = Origin(
    job_id="ft-0",
    step=8,
    base_model="finemesh/demo-llama",
    base_revision="rv_1",
    lora=Lora(rank=8, alpha=64, target_modules=("q_proj", "v_proj")),
    start_weights=b"",
)
CONTINUED = TuningSpec(base_model="", training_file="projects/p/files/f", weights_given=False, from_checkpoint="ft-0:8")


def test_a_run_that_continues_another_is_like_it_unless_it_says_otherwise() -> None:
    assert violations_of(CONTINUED) == []
    spec, violations = complete(CONTINUED, BASE, JOB_ID, ORIGIN)
    assert violations == []
    assert (spec.base_model, spec.lora) == (ORIGIN.base_model, ORIGIN.lora)
    named, violations = complete(replace(CONTINUED, weights_given=True, lora=Lora(alpha=16)), BASE, JOB_ID, ORIGIN)
    assert violations == []
    assert named.lora == replace(ORIGIN.lora or Lora(), alpha=16)
    whole, violations = complete(CONTINUED, BASE, JOB_ID, replace(ORIGIN, lora=None))
    assert (whole.lora, violations) == (None, [])


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (replace(CONTINUED, base_model="finemesh/other"), "spec.base_model"),
        (replace(CONTINUED, weights_given=True, lora=None), "spec.full"),
        (replace(CONTINUED, weights_given=True, lora=Lora(rank=16)), "spec.lora.rank"),
        (replace(CONTINUED, weights_given=True, lora=Lora(target_modules=("q_proj",))), "spec.lora.target_modules"),
    ],
)
def test_weights_of_another_shape_are_refused(spec: TuningSpec, field: str) -> None:
    assert [violation.field for violation in complete(spec, BASE, JOB_ID, ORIGIN)[1]] == [field]


def test_a_start_from_the_hub_is_kept_and_what_is_wrong_with_it_is_named() -> None:
    good = replace(SPEC, from_hub=HubStart(repository="acme/tuned", revision="refs/pr/1"))
    assert fields(good) == []
    assert complete(good, BASE, JOB_ID)[0].from_hub == good.from_hub
    assert spec_from_proto(spec_to_proto(complete(good, BASE, JOB_ID)[0])).from_hub == good.from_hub
    assert spec_from_proto(spec_to_proto(complete(SPEC, BASE, JOB_ID)[0])).from_hub is None
    for repository in ("", "only-a-name", "a/b/c", "a/../b", "https://a/b", "a/b--c"):
        assert fields(replace(SPEC, from_hub=HubStart(repository=repository))) == ["spec.from_hub.repository"]
    for revision in ("../x", "a b", "x" * 201, "-x", "a//b"):
        assert fields(replace(SPEC, from_hub=HubStart(repository="a/b", revision=revision))) == [
            "spec.from_hub.revision"
        ]
    assert fields(replace(good, from_checkpoint="ft-1")) == ["spec.from_hub"]
    assert fields(replace(good, base_model="")) == ["spec.base_model"]

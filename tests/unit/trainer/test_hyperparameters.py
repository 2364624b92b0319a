"""Every setting of a job on its whole way: the scheduler takes what is in range and refuses the next value beyond it by
its field, and what it took arrives in the training engine's own spec. Two services and the contract between them;
nothing is started.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest

from finemesh.nodes.v1 import node_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from services.scheduler.spec.convert import spec_from_proto, spec_to_proto
from services.scheduler.spec.defaults import complete
from services.scheduler.spec.tuning_limits import BaseFacts, load_limits
from services.scheduler.spec.tuning_spec import Hyperparameters
from services.scheduler.spec.violations import violations_of
from services.trainer.inputs.convert import Placement, child_spec_from_proto
from services.trainer.train.settings.spec import Spec
from services.trainer.train.settings.spec_json import parse_spec

LIMITS = load_limits().of("finemesh/demo-llama", BaseFacts(context_tokens_max=131_072, adapter_rank_max=256))
PLACEMENT = Placement(
    base_directory="/base",
    train_file="train",
    validation_file="held",
    resume_from=None,
    device="cpu",
    threads=2,
    micro_batch_tokens=4096,
)
NAN, INFINITE = float("nan"), float("inf")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """`default` is what the engine gets when nothing is said;
    `refused` are the first values out of range on either side."""

    path: str
    default: Any
    taken: tuple[Any, ...]
    refused: tuple[Any, ...]
    engine: Callable[[Any], Any]
    beside: tuple[tuple[str, Any], ...] = ()


def fraction(path: str, engine: Callable[[Any], Any], high: float = 1.0, default: float = 0.0) -> Setting:
    return Setting(
        path=path, default=default, taken=(0.5, high), refused=(-1e-9, high + 1e-6, NAN, INFINITE), engine=engine
    )


SETTINGS = (
    Setting(path="hyperparameters.epochs", default=1, taken=(1, 100), refused=(-1, 101), engine=lambda s: s.epochs),
    Setting(
        path="hyperparameters.evaluations", default=0, taken=(0, 100), refused=(-1, 101), engine=lambda s: s.evaluations
    ),
    Setting(
        path="hyperparameters.checkpoints", default=1, taken=(1, 100), refused=(-1, 101), engine=lambda s: s.checkpoints
    ),
    Setting(
        path="hyperparameters.batch_size", default=8, taken=(1, 1024), refused=(-1, 4097), engine=lambda s: s.batch_size
    ),
    Setting(
        path="hyperparameters.gradient_accumulation_steps", default=1, taken=(1, 256), refused=(-1, 257),
        engine=lambda s: s.gradient_accumulation_steps,
    ),
    Setting(
        path="hyperparameters.learning_rate", default=2e-4, taken=(1e-12, 1.0),
        refused=(-1e-9, 1.000001, NAN, INFINITE),
        engine=lambda s: s.learning_rate,
    ),
    Setting(
        path="hyperparameters.learning_rate_schedule", default="cosine",
        taken=(), refused=(7,), engine=lambda s: s.schedule.type,
    ),
    fraction("hyperparameters.min_learning_rate_ratio", lambda s: s.schedule.min_lr_ratio),
    Setting(
        path="hyperparameters.cycle_count", default=0.5, taken=(0.1, 10.0), refused=(-0.1, 10.1, NAN, INFINITE),
        engine=lambda s: s.schedule.num_cycles,
    ),
    fraction("hyperparameters.warmup_ratio", lambda s: s.warmup_ratio),
    fraction("hyperparameters.weight_decay", lambda s: s.weight_decay),
    Setting(
        path="hyperparameters.gradient_norm_max", default=1.0, taken=(0.0, 1000.0),
        refused=(-0.1, 1000.1, NAN, INFINITE),
        engine=lambda s: s.max_grad_norm,
    ),
    Setting(
        path="hyperparameters.sequence_tokens_max", default=131_072, taken=(16, 131_072), refused=(15, 131_073),
        engine=lambda s: s.max_seq_length,
    ),
    Setting(
        path="hyperparameters.seed", default=42, taken=(0, 2**32 - 1), refused=(-1, 2**32),
        engine=lambda s: s.seed,
    ),
    Setting(
        path="hyperparameters.checkpoint_interval_steps", default=None, taken=(1, 10**6), refused=(-1, 10**6 + 1),
        engine=lambda s: s.checkpoint_every_steps,
    ),
    Setting(path="hyperparameters.packing", default=True, taken=(True, False), refused=(), engine=lambda s: s.packing),
    Setting(
        path="hyperparameters.early_stopping.patience", default=2, taken=(1, 100), refused=(-1, 101),
        engine=lambda s: s.early_stopping and s.early_stopping.patience,
        beside=(("hyperparameters.epochs", 100), ("hyperparameters.evaluations", 100)),
    ),
    Setting(
        path="hyperparameters.early_stopping.min_delta", default=0.0, taken=(0.0, 100.0),
        refused=(-0.1, 100.1, NAN, INFINITE),
        engine=lambda s: s.early_stopping and s.early_stopping.min_delta,
        beside=(("hyperparameters.epochs", 100), ("hyperparameters.evaluations", 100)),
    ),
    Setting(
        path="hyperparameters.early_stopping.warmup_evaluations", default=1, taken=(0, 100), refused=(-1, 101),
        engine=lambda s: s.early_stopping and s.early_stopping.warmup_evaluations,
        beside=(("hyperparameters.epochs", 100), ("hyperparameters.evaluations", 100)),
    ),
    Setting(path="lora.rank", default=16, taken=(1, 256), refused=(-1, 257), engine=lambda s: s.training.r),
    Setting(path="lora.alpha", default=32, taken=(1, 1024), refused=(-1, 1025), engine=lambda s: s.training.alpha),
    fraction("lora.dropout", lambda s: s.training.dropout, high=0.9),
    Setting(
        path="dpo.beta", default=0.1, taken=(1e-6, 10.0), refused=(-1e-9, 10.1, NAN, INFINITE),
        engine=lambda s: s.method_settings and s.method_settings.beta,
    ),
    Setting(
        path="dpo.rpo_alpha", default=0.0, taken=(0.5, 10.0), refused=(-1e-9, 10.1, NAN, INFINITE),
        engine=lambda s: s.method_settings and s.method_settings.rpo_alpha,
    ),
    Setting(
        path="dpo.simpo_gamma", default=0.0, taken=(0.5, 10.0), refused=(-1e-9, 10.1, NAN, INFINITE),
        engine=lambda s: s.method_settings and s.method_settings.simpo_gamma,
    ),
    Setting(
        path="dpo.normalize_logratios_by_length", default=False, taken=(True,), refused=(),
        engine=lambda s: s.method_settings and s.method_settings.normalize_logratios_by_length,
    ),
    Setting(
        path="dpo.reference_free", default=False, taken=(True,), refused=(),
        engine=lambda s: s.method_settings and s.method_settings.reference_free,
    ),
    Setting(
        path="kto.beta", default=0.1, taken=(1e-6, 10.0), refused=(-1e-9, 10.1, NAN, INFINITE),
        engine=lambda s: s.method_settings and s.method_settings.beta,
    ),
    Setting(
        path="kto.desirable_weight", default=1.0, taken=(1e-6, 100.0), refused=(-1e-9, 100.1, NAN, INFINITE),
        engine=lambda s: s.method_settings and s.method_settings.desirable_weight,
    ),
    Setting(
        path="kto.undesirable_weight", default=1.0, taken=(1e-6, 100.0), refused=(-1e-9, 100.1, NAN, INFINITE),
        engine=lambda s: s.method_settings and s.method_settings.undesirable_weight,
    ),
)  # fmt: skip
BY_PATH = {setting.path: setting for setting in SETTINGS}


def request(**values: Any) -> tuning.TuningSpec:
    """A message with these values at their paths."""
    message = tuning.TuningSpec(base_model="finemesh/demo-llama", training_file="projects/p/files/t")
    message.validation_file = "projects/p/files/v"
    for path, value in values.items():
        *parents, name = path.split(".")
        place: Any = message
        for parent in parents:
            place = getattr(place, parent)
        place.SetInParent()
        setattr(place, name, value)
    return message


def in_the_engine(message: tuning.TuningSpec) -> Spec:
    """As the scheduler stores it and hands it out, and the agent writes it for its child."""
    asked = spec_from_proto(message)
    assert violations_of(asked) == []
    completed, violations = complete(asked, LIMITS, "ft-1")
    assert violations == []
    assignment = node_pb2.Assignment(spec=spec_to_proto(completed), base_revision="rv_1")
    assignment.lease.tuning_job = "projects/p/tuningJobs/ft-1"
    return parse_spec(child_spec_from_proto(assignment, PLACEMENT))


@pytest.mark.parametrize("path", BY_PATH)
def test_a_setting_arrives_in_the_engine(path: str) -> None:
    setting = BY_PATH[path]
    for value in setting.taken:
        assert setting.engine(in_the_engine(request(**dict(setting.beside), **{path: value}))) == value


@pytest.mark.parametrize(
    ("path", "value"), [(setting.path, value) for setting in SETTINGS for value in setting.refused]
)
def test_the_next_value_out_of_range_is_refused_by_its_field(path: str, value: Any) -> None:
    found = violations_of(spec_from_proto(request(**dict(BY_PATH[path].beside), **{path: value})))
    assert [violation.field for violation in found] == [f"spec.{path}"]
    assert found[0].description


@pytest.mark.parametrize("path", BY_PATH)
def test_nothing_said_is_the_documented_default(path: str) -> None:
    setting = BY_PATH[path]
    message = request(**dict(setting.beside))
    for part in ("dpo", "kto", "hyperparameters.early_stopping"):
        if path.startswith(part):
            place: Any = message
            for name in part.split("."):
                place = getattr(place, name)
            place.SetInParent()
    assert setting.engine(in_the_engine(message)) == setting.default


def test_the_table_has_every_hyperparameter() -> None:
    """`schedule` and `batch_size_max` go by other names in the contract, or have a test of their own."""
    named = {path.split(".")[1] for path in BY_PATH if path.startswith("hyperparameters.")}
    renamed = {"learning_rate_schedule": "schedule"}
    own = {field.name for field in fields(Hyperparameters)} - {"batch_size_max"}
    assert {renamed.get(name, name) for name in named} == own


def test_a_line_has_no_waves_and_the_cosine_is_the_default() -> None:
    linear = request(**{"hyperparameters.learning_rate_schedule": tuning.LEARNING_RATE_SCHEDULE_LINEAR})
    assert in_the_engine(linear).schedule.type == "linear"
    linear.hyperparameters.cycle_count = 1.0
    assert [found.field for found in violations_of(spec_from_proto(linear))] == ["spec.hyperparameters.cycle_count"]


@pytest.mark.parametrize(
    ("weights", "method", "largest"), [("lora", "", 1024), ("full", "", 1024), ("lora", "dpo", 512)]
)
def test_the_largest_batch_of_the_limits_arrives(weights: str, method: str, largest: int) -> None:
    message = request(**{"hyperparameters.batch_size_max": True})
    for part in (weights, method):
        if part:
            getattr(message, part).SetInParent()
    assert in_the_engine(message).sequences_per_step == largest


def test_all_linear_layers_have_two_spellings_and_names_arrive_in_order() -> None:
    message = request()
    message.lora.target_modules.append("all-linear")
    assert in_the_engine(message).training == in_the_engine(request()).training
    message.lora.target_modules[:] = ["v_proj", "q_proj", "v_proj"]
    training: Any = in_the_engine(message).training
    assert training.target_modules == ("q_proj", "v_proj")
    message.lora.target_modules.append("all-linear")
    assert [found.field for found in violations_of(spec_from_proto(message))] == ["spec.lora.target_modules[3]"]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"lora.rank": 65}, "spec.lora.rank"),
        ({"hyperparameters.sequence_tokens_max": 2049}, "spec.hyperparameters.sequence_tokens_max"),
        ({"hyperparameters.batch_size": 1025}, "spec.hyperparameters.batch_size"),
        ({"hyperparameters.batch_size": 513, "dpo.beta": 0.1}, "spec.hyperparameters.batch_size"),
    ],
)
def test_what_a_model_does_not_allow_is_refused_by_its_field(asked: dict[str, Any], field: str) -> None:
    limits = load_limits().of("finemesh/demo-llama", BaseFacts(context_tokens_max=2048, adapter_rank_max=64))
    spec = spec_from_proto(request(**asked))
    assert violations_of(spec) == []
    assert [violation.field for violation in complete(spec, limits, "ft-1")[1]] == [field]

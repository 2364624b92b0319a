"""The child's spec from an assignment; what comes out must pass the child's own checks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chassis.errors import InvalidArgument
from finemesh.nodes.v1 import node_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from services.trainer.inputs.convert import Placement, child_spec_from_proto, job_id_of, kind_from_proto
from services.trainer.train.settings.directories import Directories
from services.trainer.train.settings.methods import Dpo, EarlyStopping, Kto, StartFrom
from services.trainer.train.settings.spec import Gang, LoraTraining
from services.trainer.train.settings.spec_json import parse_spec

PLACEMENT = Placement(
    base_directory="/base",
    train_file="inputs/train/file-1",
    validation_file="inputs/validation/file-2",
    resume_from=None,
    device="cpu",
    threads=2,
    micro_batch_tokens=4096,
)


def make_assignment(**hyperparameters: Any) -> node_pb2.Assignment:
    assignment = node_pb2.Assignment(base_revision="rv_1", device_indices=[0])
    assignment.lease.tuning_job = "projects/proj_1/tuningJobs/ft-1"
    assignment.spec.base_model = "finemesh/demo-llama"
    assignment.spec.hyperparameters.CopyFrom(tuning.Hyperparameters(**{"learning_rate": 1e-3, **hyperparameters}))
    return assignment


def test_a_full_spec_arrives_field_by_field() -> None:
    assignment = make_assignment(
        epochs=3,
        evaluations=2,
        batch_size=16,
        learning_rate=2e-4,
        warmup_ratio=0.1,
        learning_rate_schedule=tuning.LEARNING_RATE_SCHEDULE_LINEAR,
        min_learning_rate_ratio=0.2,
        weight_decay=0.3,
        gradient_norm_max=0.0,
        sequence_tokens_max=512,
        seed=0,
        checkpoint_interval_steps=7,
    )
    assignment.spec.lora.CopyFrom(
        tuning.LoraTraining(rank=8, alpha=32, dropout=0.1, target_modules=["q_proj", "v_proj"])
    )
    assignment.spec.supervised.train_on_inputs = tuning.TRAIN_ON_INPUTS_FALSE
    spec = parse_spec(child_spec_from_proto(assignment, PLACEMENT))

    assert spec.job_id == "ft-1"
    assert (spec.epochs, spec.evaluations, spec.batch_size, spec.gradient_accumulation_steps) == (3, 2, 16, 1)
    assert (spec.learning_rate, spec.warmup_ratio, spec.weight_decay) == (2e-4, 0.1, 0.3)
    assert (spec.schedule.type, spec.schedule.min_lr_ratio) == ("linear", 0.2)
    # Zero is a setting here, not an omission: no clipping, and the seed 0.
    assert (spec.max_grad_norm, spec.seed) == (0.0, 0)
    assert (spec.max_seq_length, spec.checkpoint_every_steps) == (512, 7)
    assert spec.train_on_inputs is False
    assert isinstance(spec.training, LoraTraining)
    assert (spec.training.r, spec.training.alpha, spec.training.dropout) == (8, 32, 0.1)
    assert spec.training.target_modules == ("q_proj", "v_proj")
    assert (spec.base_model.directory, spec.base_model.id, spec.base_model.revision) == (
        "/base",
        "finemesh/demo-llama",
        "rv_1",
    )


def test_what_is_left_out_gets_the_documented_defaults() -> None:
    spec = parse_spec(child_spec_from_proto(make_assignment(), PLACEMENT))
    assert (spec.epochs, spec.evaluations, spec.batch_size, spec.max_grad_norm, spec.seed) == (1, 0, 8, 1.0, 42)
    assert isinstance(spec.training, LoraTraining)
    assert (spec.training.r, spec.training.alpha, spec.training.target_modules) == (16, 32, "all-linear")
    assert (spec.schedule.type, spec.train_on_inputs, spec.max_seq_length) == ("cosine", "auto", None)


def test_no_evaluation_without_a_validation_file() -> None:
    placement = Placement(**{**vars(PLACEMENT), "validation_file": None})
    assert parse_spec(child_spec_from_proto(make_assignment(evaluations=3), placement)).evaluations == 0


def test_full_weights_have_no_adapter() -> None:
    assignment = make_assignment()
    assignment.spec.full.SetInParent()
    assert child_spec_from_proto(assignment, PLACEMENT)["training"] == {"type": "full"}
    assert kind_from_proto(assignment.spec) == "full"
    assert kind_from_proto(make_assignment().spec) == "adapter"


@pytest.mark.parametrize(
    ("examples", "expected"), [(1, (1, 1)), (1024, (1024, 1)), (4096, (1024, 4)), (1030, (515, 2)), (3000, (1000, 3))]
)
def test_a_large_batch_becomes_accumulation(examples: int, expected: tuple[int, int]) -> None:
    spec = parse_spec(child_spec_from_proto(make_assignment(batch_size=examples), PLACEMENT))
    assert (spec.batch_size, spec.gradient_accumulation_steps) == expected


@pytest.mark.parametrize("hyperparameters", [{"batch_size": 4093}, {"learning_rate": 0.0}])
def test_what_no_child_could_run_names_its_field(hyperparameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        child_spec_from_proto(make_assignment(**hyperparameters), PLACEMENT)
    assert refused.value.violations[0].field == f"hyperparameters.{next(iter(hyperparameters))}"


def test_several_devices_are_as_many_processes() -> None:
    assert parse_spec(child_spec_from_proto(make_assignment(), PLACEMENT)).processes == 1
    assert parse_spec(child_spec_from_proto(make_assignment(), replace(PLACEMENT, processes=2))).processes == 2


def test_the_planner_is_told_how_large_a_device_is_where_that_is_known() -> None:
    assert parse_spec(child_spec_from_proto(make_assignment(), PLACEMENT)).device_memory_bytes is None
    placement = replace(PLACEMENT, device="cuda:0", device_memory_bytes=80 * 2**30)
    assert parse_spec(child_spec_from_proto(make_assignment(), placement)).device_memory_bytes == 80 * 2**30


def test_a_node_of_a_gang_knows_its_part() -> None:
    assignment = make_assignment()
    assignment.gang.CopyFrom(
        node_pb2.GangPart(node_count=2, leads=True, endpoint="n1:29400", id="ft-1-7", address="n1")
    )
    gang = Gang(nodes=2, endpoint="n1:29400", id="ft-1-7", address="n1", leads=True)
    assert parse_spec(child_spec_from_proto(assignment, PLACEMENT)).gang == gang
    assert parse_spec(child_spec_from_proto(make_assignment(), PLACEMENT)).gang is None


def test_the_job_id_is_the_last_part_of_the_name() -> None:
    assert job_id_of("projects/proj_1/tuningJobs/ft-9") == "ft-9"


def test_every_later_hyperparameter_arrives() -> None:
    assignment = make_assignment(
        epochs=4,
        evaluations=1,
        batch_size=2048,
        gradient_accumulation_steps=3,
        cycle_count=1.5,
        packing=False,
        checkpoints=4,
        early_stopping=tuning.EarlyStopping(patience=2, min_delta=0.01, warmup_evaluations=0),
    )
    spec = parse_spec(child_spec_from_proto(assignment, PLACEMENT))
    assert (spec.batch_size, spec.gradient_accumulation_steps) == (1024, 6)
    assert (spec.schedule.num_cycles, spec.packing, spec.checkpoints) == (1.5, False, 4)
    assert spec.early_stopping == EarlyStopping(patience=2, min_delta=0.01, warmup_evaluations=0)
    assert spec.method_settings is None
    assert spec.start_from is None


def test_preferences_arrive_with_their_settings() -> None:
    assignment = make_assignment()
    assignment.spec.dpo.CopyFrom(tuning.DpoMethod(beta=0.3, reference_free=True, rpo_alpha=1.0))
    spec = parse_spec(child_spec_from_proto(assignment, PLACEMENT))
    assert spec.method == "dpo"
    assert spec.method_settings == Dpo(beta=0.3, reference_free=True, rpo_alpha=1.0)
    assignment.spec.dpo.CopyFrom(tuning.DpoMethod())
    assert parse_spec(child_spec_from_proto(assignment, PLACEMENT)).method_settings == Dpo(beta=0.1)


def test_feedback_arrives_with_its_settings() -> None:
    assignment = make_assignment()
    assignment.spec.kto.CopyFrom(tuning.KtoMethod(beta=0.3, undesirable_weight=0.5))
    spec = parse_spec(child_spec_from_proto(assignment, PLACEMENT))
    assert spec.method == "kto"
    assert spec.method_settings == Kto(beta=0.3, desirable_weight=1.0, undesirable_weight=0.5)


def test_weights_to_start_from_are_named_by_job_place_and_digest() -> None:
    assignment = make_assignment()
    assignment.start_from.tuning_job = "projects/proj_1/tuningJobs/ft-0"
    assignment.start_from.step = 7
    placement = Placement(**{**vars(PLACEMENT), "start_directory": "inputs/start", "start_sha256": "a" * 64})
    assert parse_spec(child_spec_from_proto(assignment, placement)).start_from == StartFrom(
        directory="inputs/start",
        tuning_job="projects/proj_1/tuningJobs/ft-0",
        step=7,
        revision="",
        sha256="a" * 64,
    )


def test_accumulation_beyond_the_child_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        child_spec_from_proto(make_assignment(batch_size=4096, gradient_accumulation_steps=256), PLACEMENT)


def test_the_child_is_told_where_prepared_files_are_kept_and_it_does_not_change_what_is_learned() -> None:
    placement = replace(PLACEMENT, prepared_directory="/cache/prepared", prepared_bytes_max=7, prepare_workers=4)
    spec = parse_spec(child_spec_from_proto(make_assignment(), placement))
    assert spec.directories == Directories(cache=Path("/cache/prepared"), cache_bytes_max=7, workers=4)
    elsewhere = parse_spec(child_spec_from_proto(make_assignment(), PLACEMENT))
    assert elsewhere.directories == Directories()
    assert elsewhere.digest() == spec.digest()

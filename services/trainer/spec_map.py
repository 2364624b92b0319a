"""The spec of a training child from an assignment of the scheduler: what is asked for, plus where this node put it.

A pure translation: it reads no file and starts nothing. Ranges are the child's to check, except what it could not see.
"""

from dataclasses import dataclass
from typing import Any

from chassis.errors import FieldViolation, InvalidArgument, Unimplemented
from finemesh.nodes.v1 import node_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as tuning

# The child takes a step as batch_size * gradient_accumulation_steps.
_CHILD_BATCH_MAX = 1024
_CHILD_ACCUMULATION_MAX = 256
_EVALUATIONS_DEFAULT = 1

_SCHEDULES = {
    tuning.LEARNING_RATE_SCHEDULE_UNSPECIFIED: "cosine",
    tuning.LEARNING_RATE_SCHEDULE_COSINE: "cosine",
    tuning.LEARNING_RATE_SCHEDULE_LINEAR: "linear",
}
_TRAIN_ON_INPUTS: dict[int, bool | str] = {
    tuning.TRAIN_ON_INPUTS_UNSPECIFIED: "auto",
    tuning.TRAIN_ON_INPUTS_AUTO: "auto",
    tuning.TRAIN_ON_INPUTS_TRUE: True,
    tuning.TRAIN_ON_INPUTS_FALSE: False,
}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where this node put the inputs, and what it runs them on. Paths may be relative to the work folder."""

    base_directory: str
    train_file: str
    validation_file: str | None
    resume_from: str | None
    device: str
    threads: int
    micro_batch_tokens: int


def job_id_of(tuning_job: str) -> str:
    """`ft-...` of `projects/{project}/tuningJobs/ft-...`."""
    return tuning_job.rpartition("/")[2]


def kind_of(spec: tuning.TuningSpec) -> str:
    """`adapter` or `full`."""
    return "full" if spec.WhichOneof("weights") == "full" else "adapter"


def child_spec(assignment: node_pb2.Assignment, placement: Placement) -> dict[str, Any]:
    """The document of spec.json. Settings left at zero are left out, so that the child's defaults hold.

    InvalidArgument or Unimplemented for what no child could run.
    """
    if len(assignment.device_indices) > 1:
        raise Unimplemented("NOT_OFFERED", "training on several devices is not offered here; ask for one GPU")
    spec, hyper = assignment.spec, assignment.spec.hyperparameters
    if hyper.learning_rate <= 0:
        raise _invalid("hyperparameters.learning_rate", "must be above 0")
    document: dict[str, Any] = {
        "job_id": job_id_of(assignment.lease.tuning_job),
        "method": "sft",
        "training": _training(spec),
        "base_model": {
            "directory": placement.base_directory,
            "id": spec.base_model,
            "revision": assignment.base_revision,
        },
        "train_file": placement.train_file,
        "validation_file": placement.validation_file,
        "evaluations": _evaluations(hyper, placement),
        "learning_rate": hyper.learning_rate,
        "schedule": {"type": _SCHEDULES[hyper.learning_rate_schedule], "min_lr_ratio": hyper.min_learning_rate_ratio},
        "warmup_ratio": hyper.warmup_ratio,
        "weight_decay": hyper.weight_decay,
        "train_on_inputs": _TRAIN_ON_INPUTS[spec.supervised.train_on_inputs],
        "resume_from": placement.resume_from,
        "device": placement.device,
        "threads": placement.threads,
        "micro_batch_tokens": placement.micro_batch_tokens,
    }
    if hyper.epochs:
        document["epochs"] = hyper.epochs
    if hyper.batch_size:
        document["batch_size"], document["gradient_accumulation_steps"] = _batch(hyper.batch_size)
    if hyper.HasField("gradient_norm_max"):
        document["max_grad_norm"] = hyper.gradient_norm_max
    if hyper.HasField("seed"):
        document["seed"] = hyper.seed
    if hyper.sequence_tokens_max:
        document["max_seq_length"] = hyper.sequence_tokens_max
    if hyper.checkpoint_interval_steps:
        document["checkpoint_every_steps"] = hyper.checkpoint_interval_steps
    return document


def _training(spec: tuning.TuningSpec) -> dict[str, Any]:
    if kind_of(spec) == "full":
        return {"type": "full"}
    training: dict[str, Any] = {"type": "lora", "dropout": spec.lora.dropout}
    if spec.lora.rank:
        training["r"] = spec.lora.rank
    if spec.lora.alpha:
        training["alpha"] = spec.lora.alpha
    if spec.lora.target_modules:
        training["target_modules"] = list(spec.lora.target_modules)
    return training


def _evaluations(hyper: tuning.Hyperparameters, placement: Placement) -> int:
    if placement.validation_file is None:
        return 0
    return hyper.evaluations if hyper.HasField("evaluations") else _EVALUATIONS_DEFAULT


def _batch(examples: int) -> tuple[int, int]:
    """Examples per step as a product that the child takes, with as few accumulations as there can be."""
    for accumulation in range(1, _CHILD_ACCUMULATION_MAX + 1):
        if examples % accumulation == 0 and examples // accumulation <= _CHILD_BATCH_MAX:
            return examples // accumulation, accumulation
    raise _invalid(
        "hyperparameters.batch_size",
        f"must be at most {_CHILD_BATCH_MAX}, or a product of at most {_CHILD_BATCH_MAX} and at most"
        f" {_CHILD_ACCUMULATION_MAX}",
    )


def _invalid(field: str, rule: str) -> InvalidArgument:
    return InvalidArgument("INVALID_FIELD", f"{field} {rule}", violations=[FieldViolation(field, rule)])

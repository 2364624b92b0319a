"""Converts an assignment of the scheduler into the spec of a training child.

It reads no file and starts nothing. Ranges are checked by the child, except what the child could not see.
"""

from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict

from chassis.errors import invalid
from finemesh.nodes.v1 import node_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as tuning

# The child takes a step as batch_size * gradient_accumulation_steps.
_CHILD_BATCH_MAX = 1024
_CHILD_ACCUMULATION_MAX = 256

# The field of the method that the child calls sft.
_SUPERVISED = "supervised"
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
    # None: the default of the kind of device.
    micro_batch_tokens: int | None
    parity_command: tuple[str, ...] = ()
    # One for each device.
    processes: int = 1
    # Of the smallest device, where it has memory of its own; None leaves the memory planner out.
    device_memory_bytes: int | None = None
    # Where the weights lie that the run starts from, of an earlier job or of a repository, and the digest over their
    # files.
    start_directory: str | None = None
    start_sha256: str = ""
    # The commit of the hub's repository, when they come from there.
    start_commit: str = ""
    # Where this machine keeps prepared files and how much of them, and how many processes prepare one.
    prepared_directory: str | None = None
    prepared_bytes_max: int = 0
    prepare_workers: int = 1


def job_id_of(tuning_job: str) -> str:
    """`ft-...` of `projects/{project}/tuningJobs/ft-...`."""
    return tuning_job.rpartition("/")[2]


def kind_from_proto(spec: tuning.TuningSpec) -> str:
    """`adapter` or `full`."""
    return "full" if spec.WhichOneof("weights") == "full" else "adapter"


def child_spec_from_proto(assignment: node_pb2.Assignment, placement: Placement) -> dict[str, Any]:
    """The document of spec.json. Settings left at zero are left out, so that the child's defaults hold.

    InvalidArgument for what no child could run.
    """
    spec, hyper = assignment.spec, assignment.spec.hyperparameters
    field = spec.WhichOneof("method") or _SUPERVISED
    method = "sft" if field == _SUPERVISED else field
    if hyper.learning_rate <= 0:
        raise invalid("hyperparameters.learning_rate", "must be above 0")
    document: dict[str, Any] = {
        "job_id": job_id_of(assignment.lease.tuning_job),
        "method": method,
        "training": _training_from_proto(spec),
        "base_model": {
            "directory": placement.base_directory,
            "id": spec.base_model,
            "revision": assignment.base_revision,
        },
        "train_file": placement.train_file,
        "validation_file": placement.validation_file,
        "evaluations": 0 if placement.validation_file is None else hyper.evaluations,
        "learning_rate": hyper.learning_rate,
        "schedule": _schedule_from_proto(hyper),
        "warmup_ratio": hyper.warmup_ratio,
        "weight_decay": hyper.weight_decay,
        "train_on_inputs": _TRAIN_ON_INPUTS[spec.supervised.train_on_inputs],
        "resume_from": placement.resume_from,
        "device": placement.device,
        "threads": placement.threads,
        "micro_batch_tokens": placement.micro_batch_tokens,
        "parity_command": list(placement.parity_command),
    }
    if placement.processes > 1:
        document["processes"] = placement.processes
    if assignment.HasField("gang"):
        gang = assignment.gang
        document["gang"] = {
            "nodes": gang.node_count,
            "endpoint": gang.endpoint,
            "id": gang.id,
            "address": gang.address,
            "leads": gang.leads,
        }
    if placement.device_memory_bytes is not None:
        document["device_memory_bytes"] = placement.device_memory_bytes
    document |= _settings_from_proto(hyper)
    if field != _SUPERVISED:
        # The child knows every setting by the contract's name.
        document[method] = MessageToDict(getattr(spec, field), preserving_proto_field_name=True)
    if placement.prepared_directory is not None:
        document["directories"] = {
            "cache": placement.prepared_directory,
            "cache_bytes_max": placement.prepared_bytes_max,
            "workers": placement.prepare_workers,
        }
    if placement.start_directory is not None:
        document["start_from"] = {
            "directory": placement.start_directory,
            "tuning_job": assignment.start_from.tuning_job,
            "step": assignment.start_from.step,
            "revision": placement.start_commit or assignment.start_from.revision,
            "sha256": placement.start_sha256,
            "repository": assignment.start_from.hub.repository,
        }
    return document


def _settings_from_proto(hyper: tuning.Hyperparameters) -> dict[str, Any]:
    """What was not left at zero."""
    document: dict[str, Any] = {}
    if hyper.epochs:
        document["epochs"] = hyper.epochs
    if hyper.batch_size:
        document["batch_size"], document["gradient_accumulation_steps"] = _batch(
            hyper.batch_size, hyper.gradient_accumulation_steps or 1
        )
    if hyper.HasField("gradient_norm_max"):
        document["max_grad_norm"] = hyper.gradient_norm_max
    if hyper.HasField("seed"):
        document["seed"] = hyper.seed
    if hyper.sequence_tokens_max:
        document["max_seq_length"] = hyper.sequence_tokens_max
    if hyper.checkpoint_interval_steps:
        document["checkpoint_every_steps"] = hyper.checkpoint_interval_steps
    if hyper.HasField("packing"):
        document["packing"] = hyper.packing
    if hyper.checkpoints:
        document["checkpoints"] = hyper.checkpoints
    if hyper.HasField("early_stopping"):
        document["early_stopping"] = _early_stopping_from_proto(hyper.early_stopping)
    return document


def _schedule_from_proto(hyper: tuning.Hyperparameters) -> dict[str, Any]:
    schedule: dict[str, Any] = {
        "type": _SCHEDULES[hyper.learning_rate_schedule],
        "min_lr_ratio": hyper.min_learning_rate_ratio,
    }
    if hyper.cycle_count:
        schedule["num_cycles"] = hyper.cycle_count
    return schedule


def _early_stopping_from_proto(message: tuning.EarlyStopping) -> dict[str, Any]:
    stopping: dict[str, Any] = {"min_delta": message.min_delta}
    if message.patience:
        stopping["patience"] = message.patience
    if message.HasField("warmup_evaluations"):
        stopping["warmup_evaluations"] = message.warmup_evaluations
    return stopping


def _training_from_proto(spec: tuning.TuningSpec) -> dict[str, Any]:
    if kind_from_proto(spec) == "full":
        return {"type": "full"}
    training: dict[str, Any] = {"type": "lora", "dropout": spec.lora.dropout}
    if spec.lora.rank:
        training["r"] = spec.lora.rank
    if spec.lora.alpha:
        training["alpha"] = spec.lora.alpha
    if spec.lora.target_modules:
        training["target_modules"] = list(spec.lora.target_modules)
    return training


def _batch(examples: int, batches: int) -> tuple[int, int]:
    """Examples of a batch, and batches of a step: a product that the child takes, with as few batches as possible."""
    for parts in range(1, _CHILD_ACCUMULATION_MAX // batches + 1):
        if examples % parts == 0 and examples // parts <= _CHILD_BATCH_MAX:
            return examples // parts, parts * batches
    raise invalid(
        "hyperparameters.batch_size",
        f"must be at most {_CHILD_BATCH_MAX}, or a product of at most {_CHILD_BATCH_MAX} and at most"
        f" {_CHILD_ACCUMULATION_MAX}",
    )

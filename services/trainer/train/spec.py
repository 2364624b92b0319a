"""The settings of one run: frozen, bounded, read from the JSON that the agent writes. It reads no file and knows no torch.

{
  "job_id": "ft-...",                         required
  "method": "sft",
  "training": {"type": "lora", "r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"} or {"type": "full"},
  "base_model": {"directory": "...", "id": "finemesh/demo-llama", "revision": "rv_..."},      directory required
  "train_file": "inputs/train.jsonl",         required; paths may be relative to the work folder
  "validation_file": null,
  "max_seq_length": null,                     null: the smaller of the model's context and MAX_SEQ_LENGTH_DEFAULT
  "epochs": 1,
  "evaluations": 0,                           per epoch; needs a validation file
  "checkpoints": 1,                           those that the user asked for, evenly over the run, the last one at its end
  "batch_size": 8,                            sequences per accumulation; a step takes batch_size * gradient_accumulation_steps
  "gradient_accumulation_steps": 1,
  "learning_rate": 1e-5,
  "schedule": {"type": "cosine", "min_lr_ratio": 0.0, "num_cycles": 0.5},
  "warmup_ratio": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0 (0: no clipping),
  "seed": 42, "packing": true, "train_on_inputs": "auto" or true or false,
  "checkpoint_every_steps": null,             safety checkpoints; null: about CHECKPOINTS_PER_RUN of them
  "keep_last": 2,                             safety checkpoints kept; those asked for are kept too
  "resume_from": null,                        a checkpoint folder; null: the newest whole one of the work folder, if any
  "device": "cpu" or "cuda:N", "threads": 2, "micro_batch_tokens": 4096,
  "parity_rows": 16, "parity_tolerance": null,
  "template_date": "2024-07-26"               what `strftime_now` shows to a chat template
}
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from services.trainer.train.bounded import Reader
from services.trainer.train.failures import Violation, user_failure

TrainOnInputs = bool | Literal["auto"]

PATH_LENGTH_MAX = 4096
MAX_SEQ_LENGTH_MIN = 16
MAX_SEQ_LENGTH_MAX = 131_072
MAX_SEQ_LENGTH_DEFAULT = 4096
LORA_RANK_MAX = 256
TARGET_MODULES_MAX = 64
TEMPLATE_DATE_DEFAULT = "2024-07-26"
# Settings that say where and how, not what is learned: a resume may change them.
_OUTSIDE_THE_DIGEST = (
    "job_id", "train_file", "validation_file", "keep_last", "resume_from", "device", "threads",
    "parity_rows", "parity_tolerance",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoraTraining:
    r: int
    alpha: int
    dropout: float
    target_modules: str | tuple[str, ...]
    type: Literal["lora"] = "lora"


@dataclass(frozen=True, kw_only=True)
class FullTraining:
    type: Literal["full"] = "full"


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    directory: str
    id: str
    revision: str


@dataclass(frozen=True, kw_only=True)
class Schedule:
    type: Literal["linear", "cosine"]
    min_lr_ratio: float
    num_cycles: float


@dataclass(frozen=True, kw_only=True)
class Spec:
    job_id: str
    method: Literal["sft"]
    training: LoraTraining | FullTraining
    base_model: BaseModel
    train_file: str
    validation_file: str | None
    max_seq_length: int | None
    epochs: int
    evaluations: int
    checkpoints: int
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    schedule: Schedule
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    packing: bool
    train_on_inputs: TrainOnInputs
    checkpoint_every_steps: int | None
    keep_last: int
    resume_from: str | None
    device: str
    threads: int
    micro_batch_tokens: int
    parity_rows: int
    parity_tolerance: float | None
    template_date: str

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    def digest(self) -> str:
        """SHA-256 over what decides the learned weights; a checkpoint continues only a run with the same one."""
        decisive = {name: value for name, value in asdict(self).items() if name not in _OUTSIDE_THE_DIGEST}
        decisive["base_model"] = {"revision": self.base_model.revision}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def load_spec(path: Path) -> Spec:
    """Raises Failure(user, INVALID_FIELD) with every violation."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise user_failure("INVALID_FIELD", f"the spec cannot be read: {error}") from error
    return parse_spec(document)


def resolve_paths(spec: Spec, workdir: Path) -> Spec:
    """The same spec with every path absolute; relative ones are meant below `workdir`."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(workdir.absolute() / path)

    return replace(
        spec,
        base_model=replace(spec.base_model, directory=str(workdir.absolute() / spec.base_model.directory)),
        train_file=str(workdir.absolute() / spec.train_file),
        validation_file=absolute(spec.validation_file),
        resume_from=absolute(spec.resume_from),
    )


def parse_spec(document: Any) -> Spec:
    """Raises Failure(user, INVALID_FIELD) with every violation."""
    violations: list[Violation] = []
    reader = Reader(document, "", violations)
    spec = Spec(
        job_id=reader.text("job_id", 200),
        method=reader.choice("method", ("sft",), "sft"),
        training=_training(reader),
        base_model=_base_model(reader.child("base_model")),
        train_file=reader.text("train_file", PATH_LENGTH_MAX),
        validation_file=reader.optional_text("validation_file", PATH_LENGTH_MAX),
        max_seq_length=reader.optional_integer("max_seq_length", MAX_SEQ_LENGTH_MIN, MAX_SEQ_LENGTH_MAX),
        epochs=reader.integer("epochs", 1, 100, 1),
        evaluations=reader.integer("evaluations", 0, 100, 0),
        checkpoints=reader.integer("checkpoints", 1, 100, 1),
        batch_size=reader.integer("batch_size", 1, 1024, 8),
        gradient_accumulation_steps=reader.integer("gradient_accumulation_steps", 1, 256, 1),
        learning_rate=reader.number("learning_rate", 0.0, 1.0, 1e-5, above_low=True),
        schedule=_schedule(reader.child("schedule", {})),
        warmup_ratio=reader.number("warmup_ratio", 0.0, 1.0, 0.0),
        weight_decay=reader.number("weight_decay", 0.0, 1.0, 0.0),
        max_grad_norm=reader.number("max_grad_norm", 0.0, 1000.0, 1.0),
        seed=reader.integer("seed", 0, 2**32 - 1, 42),
        packing=reader.flag("packing", True),
        train_on_inputs=train_on_inputs(reader),
        checkpoint_every_steps=reader.optional_integer("checkpoint_every_steps", 1, 1_000_000),
        keep_last=reader.integer("keep_last", 1, 100, 2),
        resume_from=reader.optional_text("resume_from", PATH_LENGTH_MAX),
        device=_device(reader),
        threads=reader.integer("threads", 1, 256, 2),
        micro_batch_tokens=reader.integer("micro_batch_tokens", 64, 1_048_576, 4096),
        parity_rows=reader.integer("parity_rows", 1, 256, 16),
        parity_tolerance=reader.optional_number("parity_tolerance", 0.0, 10.0, above_low=True),
        template_date=template_date(reader),
    )
    reader.finish()
    if spec.evaluations and spec.validation_file is None:
        reader.refuse("evaluations", "needs a validation_file; set it to 0 or give one")
    if violations:
        names = ", ".join(violation.field for violation in violations)
        raise user_failure("INVALID_FIELD", f"the spec is invalid: {names}", violations)
    return spec


def train_on_inputs(reader: Reader) -> TrainOnInputs:
    value: TrainOnInputs = reader.choice("train_on_inputs", ("auto", True, False), "auto")
    return value


def template_date(reader: Reader) -> str:
    text = reader.text("template_date", 10, TEMPLATE_DATE_DEFAULT)
    try:
        date.fromisoformat(text)
    except ValueError:
        reader.refuse("template_date", f"must be a date as YYYY-MM-DD, not {text!r}")
    return text


def _training(parent: Reader) -> LoraTraining | FullTraining:
    reader = parent.child("training", {})
    kind = reader.choice("type", ("lora", "full"), "lora")
    if kind == "full":
        reader.finish()
        return FullTraining()
    rank = reader.integer("r", 1, LORA_RANK_MAX, 16)
    training = LoraTraining(
        r=rank,
        alpha=reader.integer("alpha", 1, 1024, 2 * rank),
        dropout=reader.number("dropout", 0.0, 0.9, 0.0),
        target_modules=_target_modules(reader),
    )
    reader.finish()
    return training


def _target_modules(reader: Reader) -> str | tuple[str, ...]:
    value = reader.raw("target_modules", "all-linear")
    if value == "all-linear":
        return "all-linear"
    names = value if isinstance(value, list) else []
    sound = [name for name in names if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name)]
    if not sound or len(sound) != len(names) or len(names) > TARGET_MODULES_MAX:
        reader.refuse("target_modules", f'must be "all-linear" or a list of 1 to {TARGET_MODULES_MAX} module names')
    return tuple(sorted(set(sound)))


def _base_model(reader: Reader) -> BaseModel:
    base = BaseModel(
        directory=reader.text("directory", PATH_LENGTH_MAX),
        id=reader.text("id", 300, ""),
        revision=reader.text("revision", 200, ""),
    )
    reader.finish()
    return base


def _schedule(reader: Reader) -> Schedule:
    schedule = Schedule(
        type=reader.choice("type", ("cosine", "linear"), "cosine"),
        min_lr_ratio=reader.number("min_lr_ratio", 0.0, 1.0, 0.0),
        num_cycles=reader.number("num_cycles", 0.0, 10.0, 0.5, above_low=True),
    )
    reader.finish()
    return schedule


def _device(reader: Reader) -> str:
    device = reader.text("device", 10, "cpu")
    if not re.fullmatch(r"cpu|cuda:\d{1,2}", device):
        reader.refuse("device", f'must be "cpu" or "cuda:N", not {device!r}')
    return device

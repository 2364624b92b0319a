"""Reads the settings of one run from the JSON that the agent writes into spec.json. Not pure: one file.

Every broken field is reported at once. Fields with their defaults:

{
  "job_id": "ft-...",               required
  "method": "sft",                  or one of METHODS, whose settings stand in a field of its name (methods.py):
  "dpo": {"beta": 0.1, ...},
  "training": {"type": "lora", "r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
    or {"type": "full"},
  "base_model": {"directory": "...", "id": "finemesh/demo-llama", "revision": "rv_..."},      directory required
  "train_file": "inputs/train.jsonl", required; paths may be relative to the work folder
  "validation_file": null,
  "max_seq_length": null,           null: the smaller of the model's context and MAX_SEQ_LENGTH_DEFAULT
  "epochs": 1,
  "evaluations": 0,                 per epoch; needs a validation file
  "checkpoints": 1,                 those that the user asked for, evenly over the run, the last one at its end
  "batch_size": 8,                  sequences per accumulation; a step takes batch_size *
  "gradient_accumulation_steps": 1,   gradient_accumulation_steps
  "learning_rate": 2e-4,            the default goes by method and weights (formats/learning_rates.py)
  "schedule": {"type": "cosine", "min_lr_ratio": 0.0, "num_cycles": 0.5},
  "warmup_ratio": 0.0, "weight_decay": 0.0,
  "max_grad_norm": 1.0,             0: no clipping
  "seed": 42, "packing": true, "train_on_inputs": "auto" or true or false,
  "checkpoint_every_steps": null,   safety checkpoints; null: about CHECKPOINTS_PER_RUN of them
  "keep_last": 2,                   safety checkpoints kept; those asked for are kept too
  "early_stopping": null or {"patience": 2, "min_delta": 0, "warmup_evaluations": 1},
  "start_from": null or {"directory": "inputs/start", "tuning_job": "...", "step": 0, "revision": "", "sha256": "..."},
  "resume_from": null,              a checkpoint folder; null: the newest whole one of the work folder, if any
  "device": "cpu" or "cuda:N",
  "threads": 2,                     of each process
  "micro_batch_tokens": null,       of each process; null: MICRO_BATCH_TOKENS
  "processes": 1,                   on this machine, one per device; process n of several takes "cuda:n"
  "parallelism": "auto" or "replicated" or "sharded",   every process holds all weights, or a part of them (FSDP2)
  "device_memory_bytes": null,      of each device; the planner fits the run into it, null: as the settings say
  "gang": null or {"nodes": 2, "endpoint": "host:port", "id": "...", "address": "", "leads": true},
                                    the machines of one run
  "activation_checkpointing": false,  less memory, a third more work, the same sums
  "compile": false,                 torch.compile of the layers, on CUDA only: minutes once, then faster steps and other
                                    last bits
  "parity_rows": 16, "parity_tolerance": null,
  "parity_command": [],             the program of this node that scores the export with a serving engine, if any
  "template_date": "2024-07-26",    what `strftime_now` shows to a chat template
  "directories": {"scratch": null, "cache": null, "cache_bytes_max": ..., "workers": 1},
                                    where data is prepared (directories.py); null: below the work folder
}
"""

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

from formats.learning_rates import LearningRateSchedule, default_learning_rate
from services.trainer.train.settings.directories import read_directories
from services.trainer.train.settings.failures import Violation, user_failure
from services.trainer.train.settings.json_reader import Reader
from services.trainer.train.settings.limits import (
    COMMAND_WORDS_MAX,
    DEVICE_MEMORY_BYTES_MAX,
    LORA_RANK_MAX,
    MAX_SEQ_LENGTH_MAX,
    MAX_SEQ_LENGTH_MIN,
    MICRO_BATCH_TOKENS,
    MICRO_BATCH_TOKENS_MAX,
    MICRO_BATCH_TOKENS_MIN,
    NODES_MAX,
    PATH_LENGTH_MAX,
    PROCESSES_MAX,
    TARGET_MODULES_MAX,
    TEMPLATE_DATE_DEFAULT,
)
from services.trainer.train.settings.methods import (
    METHODS,
    SUPERVISED,
    read_early_stopping,
    read_method_settings,
    read_start_from,
    refuse_idle_stopping,
)
from services.trainer.train.settings.spec import (
    BaseModel,
    FullTraining,
    Gang,
    LoraTraining,
    Spec,
    TrainOnInputs,
)


def load_spec(path: Path) -> Spec:
    """Raises Failure(user, INVALID_FIELD) with every violation."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise user_failure("INVALID_FIELD", f"the spec cannot be read: {error}") from error
    return parse_spec(document)


def parse_spec(document: Any) -> Spec:
    """Raises Failure(user, INVALID_FIELD) with every violation."""
    violations: list[Violation] = []
    reader = Reader(document, "", violations)
    device = _device(reader)
    method = reader.choice("method", (SUPERVISED, *METHODS), SUPERVISED)
    training = _training(reader)
    learning_rate_default = default_learning_rate(method, lora=isinstance(training, LoraTraining))
    spec = Spec(
        job_id=reader.text("job_id", 200),
        method=method,
        method_settings=read_method_settings(reader),
        training=training,
        base_model=_base_model(reader.child("base_model")),
        train_file=reader.text("train_file", PATH_LENGTH_MAX),
        validation_file=reader.optional_text("validation_file", PATH_LENGTH_MAX),
        max_seq_length=reader.optional_integer("max_seq_length", MAX_SEQ_LENGTH_MIN, MAX_SEQ_LENGTH_MAX),
        epochs=reader.integer("epochs", 1, 100, 1),
        evaluations=reader.integer("evaluations", 0, 100, 0),
        checkpoints=reader.integer("checkpoints", 1, 100, 1),
        batch_size=reader.integer("batch_size", 1, 1024, 8),
        gradient_accumulation_steps=reader.integer("gradient_accumulation_steps", 1, 256, 1),
        learning_rate=reader.number("learning_rate", 0.0, 1.0, learning_rate_default, above_low=True),
        schedule=_schedule(reader.child("schedule", {})),
        warmup_ratio=reader.number("warmup_ratio", 0.0, 1.0, 0.0),
        weight_decay=reader.number("weight_decay", 0.0, 1.0, 0.0),
        max_grad_norm=reader.number("max_grad_norm", 0.0, 1000.0, 1.0),
        seed=reader.integer("seed", 0, 2**32 - 1, 42),
        packing=reader.flag("packing", True),
        train_on_inputs=train_on_inputs(reader),
        checkpoint_every_steps=reader.optional_integer("checkpoint_every_steps", 1, 1_000_000),
        keep_last=reader.integer("keep_last", 1, 100, 2),
        early_stopping=read_early_stopping(reader),
        start_from=read_start_from(reader, PATH_LENGTH_MAX),
        resume_from=reader.optional_text("resume_from", PATH_LENGTH_MAX),
        device=device,
        threads=reader.integer("threads", 1, 256, 2),
        micro_batch_tokens=_micro_batch_tokens(reader, device),
        parity_rows=reader.integer("parity_rows", 1, 256, 16),
        parity_tolerance=reader.optional_number("parity_tolerance", 0.0, 10.0, above_low=True),
        parity_command=_command(reader),
        processes=reader.integer("processes", 1, PROCESSES_MAX, 1),
        parallelism=reader.choice("parallelism", ("auto", "replicated", "sharded"), "auto"),
        device_memory_bytes=reader.optional_integer("device_memory_bytes", 1, DEVICE_MEMORY_BYTES_MAX),
        gang=_gang(reader),
        activation_checkpointing=reader.flag("activation_checkpointing", False),
        compile=_compile(reader, device),
        template_date=template_date(reader),
        directories=read_directories(reader),
    )
    reader.finish()
    if spec.evaluations and spec.validation_file is None:
        reader.refuse("evaluations", "needs a validation_file; set it to 0 or give one")
    refuse_idle_stopping(reader, spec.early_stopping, spec.epochs * spec.evaluations)
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


def _command(reader: Reader) -> tuple[str, ...]:
    value = reader.raw("parity_command", [])
    words = value if isinstance(value, list) else [None]
    if len(words) > COMMAND_WORDS_MAX or not all(
        isinstance(word, str) and 0 < len(word) <= PATH_LENGTH_MAX for word in words
    ):
        reader.refuse("parity_command", f"must be a list of at most {COMMAND_WORDS_MAX} words")
        return ()
    return tuple(words)


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


def _gang(parent: Reader) -> Gang | None:
    if parent.raw("gang", None) is None:
        return None
    reader = parent.child("gang")
    gang = Gang(
        nodes=reader.integer("nodes", 2, NODES_MAX),
        endpoint=reader.text("endpoint", 300),
        id=reader.text("id", 200),
        address=reader.text("address", 300, ""),
        leads=reader.flag("leads", False),
    )
    reader.finish()
    return gang


def _schedule(reader: Reader) -> LearningRateSchedule:
    schedule = LearningRateSchedule(
        type=reader.choice("type", ("cosine", "linear"), "cosine"),
        min_lr_ratio=reader.number("min_lr_ratio", 0.0, 1.0, 0.0),
        num_cycles=reader.number("num_cycles", 0.0, 10.0, 0.5, above_low=True),
    )
    reader.finish()
    return schedule


def _micro_batch_tokens(reader: Reader, device: str) -> int:
    given = reader.optional_integer("micro_batch_tokens", MICRO_BATCH_TOKENS_MIN, MICRO_BATCH_TOKENS_MAX)
    return MICRO_BATCH_TOKENS.get(device.split(":")[0], MICRO_BATCH_TOKENS_MIN) if given is None else given


def _compile(reader: Reader, device: str) -> bool:
    wanted = reader.flag("compile", False)
    if wanted and device == "cpu":
        reader.refuse("compile", 'must be false on device "cpu": it pays on CUDA only')
    return wanted


def _device(reader: Reader) -> str:
    device = reader.text("device", 10, "cpu")
    if not re.fullmatch(r"cpu|cuda:\d{1,2}", device):
        reader.refuse("device", f'must be "cpu" or "cuda:N", not {device!r}')
    return device

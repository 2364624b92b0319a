"""The settings of one run, frozen. spec_json.py reads them; this module reads no file and knows no torch."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from formats.learning_rates import LearningRateSchedule
from services.trainer.train.settings.directories import Directories
from services.trainer.train.settings.limits import MICRO_BATCH_TOKENS
from services.trainer.train.settings.methods import (
    EarlyStopping,
    MethodSettings,
    StartFrom,
)

TrainOnInputs = bool | Literal["auto"]
# Settings that say where and how, not what is learned: a resume may change them.
_OUTSIDE_THE_DIGEST = (
    "job_id", "train_file", "validation_file", "keep_last", "resume_from", "device", "threads", "directories",
    "parity_rows", "parity_tolerance", "parity_command", "processes", "parallelism", "gang", "activation_checkpointing",
    "device_memory_bytes", "compile",
)  # fmt: skip
# Settings that most runs do not have: without them a run is the one it was before they existed.
_ABSENT_WHEN_NONE = ("early_stopping", "start_from")


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
class Gang:
    """The machines of one run: how many there are, and the `endpoint` where their launchers meet. It is on the machine
    that `leads`, whose first process speaks and writes for all. `id` tells one attempt from the next. The others reach
    this machine at `address`; empty is its own name."""

    nodes: int
    endpoint: str
    id: str
    address: str
    leads: bool


@dataclass(frozen=True, kw_only=True)
class Spec:
    job_id: str
    method: str
    # The settings of the method; None for supervised tuning.
    method_settings: MethodSettings | None
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
    schedule: LearningRateSchedule
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    packing: bool
    train_on_inputs: TrainOnInputs
    checkpoint_every_steps: int | None
    keep_last: int
    early_stopping: EarlyStopping | None
    start_from: StartFrom | None
    resume_from: str | None
    device: str
    threads: int
    micro_batch_tokens: int
    parity_rows: int
    parity_tolerance: float | None
    parity_command: tuple[str, ...]
    processes: int
    parallelism: Literal["auto", "replicated", "sharded"]
    device_memory_bytes: int | None
    gang: Gang | None
    activation_checkpointing: bool
    compile: bool
    template_date: str
    directories: Directories

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def stores_reference(self) -> bool:
        """Whether answers are compared with starting weights that are gone once the first step is done."""
        if self.method_settings is None or not self.method_settings.needs_reference:
            return False
        return self.training.type == "full" or self.start_from is not None

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the learned weights: no path, no name, nothing of the machine."""
        decisive = {name: value for name, value in asdict(self).items() if name not in _OUTSIDE_THE_DIGEST}
        decisive["base_model"] = {"revision": self.base_model.revision}
        if self.start_from is not None:
            decisive["start_from"] = {"sha256": self.start_from.sha256}
        if self.micro_batch_tokens in MICRO_BATCH_TOKENS.values():
            # A device's own: a run that moves to another kind takes the other one, and says that its last bits may
            # differ.
            decisive["micro_batch_tokens"] = None
        settings = decisive.pop("method_settings")
        if settings is not None:
            decisive[self.method] = settings
        for name in _ABSENT_WHEN_NONE:
            if decisive[name] is None:
                del decisive[name]
        return decisive

    def digest(self) -> str:
        """SHA-256 of the settings that decide the learned weights. A checkpoint continues only a run with the same
        digest."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()


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
        start_from=spec.start_from
        and replace(spec.start_from, directory=str(workdir.absolute() / spec.start_from.directory)),
    )

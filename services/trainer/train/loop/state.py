"""The state of a run under way: what its steps, evaluations and checkpoints share. It decides nothing."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.trainer.train.checkpoint.position import Position
from services.trainer.train.checkpoint.writer import SavedCheckpoint
from services.trainer.train.data.run_inputs import Inputs
from services.trainer.train.loop.device_read import DeviceRead
from services.trainer.train.loop.prefetch import StepBatches
from services.trainer.train.loop.progress_report import Progress
from services.trainer.train.losses.objective import Objective
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.runtime.event_stream import Emit
from services.trainer.train.runtime.process_group import ALONE, Group

# In the work folder: the weights of the best evaluation so far.
BEST = "best"


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A step whose `numbers`, its loss, gradient norm, the bound of its loss and its balancing loss, the host has not
    read yet; `step` counts from 0."""

    step: int
    learning_rate: float
    tokens: int
    started_s: float
    numbers: DeviceRead


@dataclass(frozen=True, kw_only=True)
class PendingCheckpoint:
    """A checkpoint on its way to the disk. `asked` says that the user asked for it."""

    step: int
    loss: float | None
    asked: bool
    written: "Future[SavedCheckpoint]"


@dataclass(kw_only=True)
class Run:
    """`position` counts the steps whose numbers were read; one more may be `launched`. `poisoned` is a flag on the
    device, None before the first step. Once it is set no update is applied any more. `attachments` are files that every
    checkpoint carries, by their name in it."""

    inputs: Inputs
    model: CausalModel
    optimizer: Any
    emit: Emit
    stopping: Callable[[], bool]
    progress: Progress
    position: Position = field(default_factory=Position)
    launched: Launched | None = None
    poisoned: Any = None
    last_checkpoint_step: int | None = None
    group: Group = ALONE
    # At most the spec's; less once memory ran out.
    micro_batch_tokens: int
    # The same of evaluations, which hold less and therefore shrink by themselves.
    evaluation_tokens: int
    objective: Objective
    validation_objective: Objective
    batches: StepBatches
    # What a checkpoint says of it (checkpoint/machine.py).
    machine: Mapping[str, Any]
    pending_checkpoint: PendingCheckpoint | None = None
    attachments: dict[str, Path] = field(default_factory=dict)

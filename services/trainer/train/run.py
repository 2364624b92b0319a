"""A run under way: what its steps, evaluations and checkpoints share. It decides nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.trainer.train.ahead import StepBatches
from services.trainer.train.distributed import ALONE, Group
from services.trainer.train.events import Emit
from services.trainer.train.inputs import Inputs
from services.trainer.train.look import Look
from services.trainer.train.model import CausalModel
from services.trainer.train.objective import Objective
from services.trainer.train.position import Position
from services.trainer.train.progress import Progress

if TYPE_CHECKING:
    from services.trainer.train.saving import Saving

# In the work folder: the weights of the best evaluation so far.
BEST = "best"


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A step whose `numbers`, its loss and gradient norm, the host has not seen yet; `step` counts from 0."""

    step: int
    learning_rate: float
    tokens: int
    started_s: float
    numbers: Look


@dataclass(kw_only=True)
class Run:
    """`position` counts the steps that were looked at; one more may be `launched`. `poisoned` is a flag on the device, None before
    the first step: once it is set no update is applied any more. `attachments` are files that every checkpoint carries, by the
    name that they get there."""

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
    saving: "Saving | None" = None
    attachments: dict[str, Path] = field(default_factory=dict)

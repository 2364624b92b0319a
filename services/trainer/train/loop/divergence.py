"""A look at the policy before a step or an evaluation: a mean over mismatched rows, of all processes.

It is taken with the weights that the step starts from and without dropout, and touches no random state. So it is the
same in an attempt that resumes, and, but for the order of sums, for any micro-batches and number of processes.
"""

from collections.abc import Callable, Iterable

import torch

from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.loop.look import look_over
from services.trainer.train.losses.objective import LooksAhead, Objective
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.runtime.process_group import Group


def look_ahead(
    model: CausalModel,
    objective: Objective,
    batches: Iterable[MicroBatch],
    idle: Callable[[], MicroBatch],
    group: Group,
) -> bool:
    """Gives the objective the mean over these micro-batches. False, on every process, when memory ran out."""
    assert isinstance(objective, LooksAhead)
    # It stays on the device, as the loss of a step does.
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    rows = 0

    def look(batch: MicroBatch) -> None:
        nonlocal total, rows
        total += objective.look(model, batch).double()
        rows += len(batch.rows) if batch.labelled else 0

    enough = look_over(model, group, batches, look, idle)
    if enough:
        (rows_of_all,) = group.total([float(rows)])
        objective.take((group.add(total) / rows_of_all).float())
    return enough

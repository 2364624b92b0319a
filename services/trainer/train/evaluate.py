"""How well a model does on the validation rows, with dropout off and no trace left in any random state. It knows no schedule."""

from collections.abc import Callable

import torch

from services.trainer.train.batches import MicroBatch
from services.trainer.train.distributed import ALONE, Group
from services.trainer.train.failures import Stopped
from services.trainer.train.model import CausalModel
from services.trainer.train.objective import Evaluation, Objective


def evaluate(
    model: CausalModel,
    objective: Objective,
    batches: list[MicroBatch],
    stopping: Callable[[], bool],
    group: Group = ALONE,
) -> Evaluation:
    """Means over the batches of all processes. Raises Stopped between batches."""
    model.module.eval()
    sums = []
    with torch.no_grad():
        for batch in batches:
            if stopping():
                raise Stopped
            sums.append(objective.sums(model, batch))
    model.module.train()
    return objective.evaluation(group.total([sum(column) for column in zip(*sums, strict=True)]))

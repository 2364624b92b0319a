"""How well a model does on the validation rows, with dropout off and no trace left in any random state. It knows no schedule."""

from collections.abc import Callable, Iterator

import torch

from services.trainer.train.batches import MicroBatch
from services.trainer.train.distributed import ALONE, Group
from services.trainer.train.failures import Stopped
from services.trainer.train.memory import fits
from services.trainer.train.model import CausalModel
from services.trainer.train.objective import Evaluation, Objective
from services.trainer.train.whole_file import FileBatches


def evaluate(
    model: CausalModel,
    objective: Objective,
    batches: FileBatches,
    stopping: Callable[[], bool],
    tell: Callable[[int], None],
    group: Group = ALONE,
) -> Evaluation | None:
    """Means over the batches of all processes; None when memory ran out. `tell` hears of each batch that is done.
    Raises Stopped between batches."""
    sums: list[list[float]] = []

    def look(batch: MicroBatch) -> None:
        sums.append(objective.sums(model, batch))
        tell(1)

    def heeding() -> Iterator[MicroBatch]:
        for batch in batches:
            if stopping():
                raise Stopped
            yield batch

    model.module.eval()
    try:
        with torch.no_grad():
            enough = fits(model, group, heeding(), look, batches.idle)
    finally:
        model.module.train()
    if not enough:
        return None
    return objective.evaluation(group.total([sum(column) for column in zip(*sums, strict=True)]))

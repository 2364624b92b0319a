"""A look at the model over some micro-batches, between steps: no gradient, no dropout, no random state is touched."""

from collections.abc import Callable, Iterable

import torch

from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.memory.out_of_memory import fits
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.runtime.process_group import Group


def look_over(
    model: CausalModel,
    group: Group,
    batches: Iterable[MicroBatch],
    look: Callable[[MicroBatch], None],
    idle: Callable[[], MicroBatch],
) -> bool:
    """Calls `look` with every micro-batch. False, on every process, when memory ran out."""
    was_training = model.module.training
    model.module.eval()
    try:
        with torch.no_grad():
            return fits(model, group, batches, look, idle)
    finally:
        model.module.train(was_training)

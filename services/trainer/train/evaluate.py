"""The loss on the validation rows, with dropout off and no trace left in any random state. It knows no schedule."""

from collections.abc import Callable

import torch

from services.trainer.train.batches import MicroBatch
from services.trainer.train.failures import Stopped
from services.trainer.train.model import CausalModel


def validation_loss(model: CausalModel, batches: list[MicroBatch], stopping: Callable[[], bool]) -> float:
    """Mean over all labelled tokens (nats). Raises Stopped between batches."""
    model.module.eval()
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            if stopping():
                raise Stopped
            total += model.loss_sum(batch).item()
    model.module.train()
    return total / sum(batch.labelled for batch in batches)
